"""The import stage: a model from elsewhere becomes a Hugging Face folder or a bundle."""

from typing import Any

from pipelines.importing.dual_mode import import_dual_mode
from pipelines.importing.gguf_import import import_gguf
from pipelines.importing.sources import find_source
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.provenance import MADE_BY
from tidar_core.errors import UserError

__all__ = ["import_model"]


def import_model(
    source: str, output: str, *, mask_token: str | None = None, block_len: int | None = None
) -> dict[str, Any]:
    """Import a model and return facts for a person. An earlier import at `output` is replaced.

    source      local path, file:// or s3:// of a GGUF file or of a dual-mode checkpoint's folder; or package:NAME
    output      folder for the result; local, file:// or s3://
    mask_token  id or text of the mask token of a dual-mode checkpoint
    block_len   draft block that a dual-mode checkpoint was trained with
    """
    if (mask_token is None) != (block_len is None):
        raise UserError(
            "--mask-token and --block-len belong together; give both for a dual-mode checkpoint, or neither"
        )
    origin, output = find_source(source), locations.absolute(output)
    _refuse_other_work(output)
    if origin.path.is_file():
        if mask_token is not None:
            raise UserError(
                f"{source} is a file; --mask-token and --block-len are for folders; import the file first, then its "
                "folder with these options"
            )
        return import_gguf(origin, output)
    if mask_token is None or block_len is None:
        raise UserError(
            f"{source} is a Hugging Face folder already: give it to tidar train as init_from; if it was trained as "
            "TiDAR, import it with --mask-token and --block-len"
        )
    return import_dual_mode(origin, output, mask_token=mask_token, block_len=block_len)


def _refuse_other_work(output: str) -> None:
    """Raise UserError if another command made the folder at `output`."""
    note = locations.join(output, MADE_BY)
    if locations.exists(note) and _command_in(note) != "import":
        raise UserError(f"{output} was not made by tidar import; remove it or give another output folder")


def _command_in(note: str) -> Any:
    """The command that a made_by.json names; None if it names no command."""
    try:
        found = locations.read_json(note)
    except ValueError:
        return None
    job = found.get("job") if isinstance(found, dict) else None
    return job.get("command") if isinstance(job, dict) else None
