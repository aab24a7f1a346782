"""Import of a GGUF file: a Hugging Face folder with the values that the file's weights represent."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.cluster.progress import job_progress
from pipelines.importing.sources import Origin
from tidar_core.artifacts.model.gguf_file import GgufFile
from tidar_core.artifacts.model.gguf_model import GgufModel
from tidar_core.artifacts.model.hf_weights import check_weights, require_embeddings
from tidar_core.artifacts.model.hf_writer import write_config, write_weights
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.output_folder import staged_folder
from tidar_core.artifacts.store.output_lock import output_lock
from tidar_core.artifacts.store.provenance import MADE_BY, made_by, write_made_by
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.end_tokens import GENERATION_CONFIG, read_end_tokens
from tidar_core.artifacts.text.gguf_tokenizer import gguf_token_ids, gguf_tokenizer
from tidar_core.artifacts.text.tokenizer import Tokenizer, load_tokenizer
from tidar_core.errors import TokenizerError

__all__ = ["import_gguf"]


def import_gguf(origin: Origin, output: str) -> dict[str, Any]:
    """Write the model of a GGUF file as a Hugging Face folder at `output`, and return facts for a person.

    Raises UserError, before anything is written, for a file that cannot be represented exactly.
    """
    file = GgufFile(origin.path)
    model = GgufModel(file)
    tokenizer = gguf_tokenizer(file.fields, origin.path.name)
    require_embeddings(model.config, tokenizer.vocab_len)
    sha256 = locations.sha256(str(origin.path))
    identity = {
        "file": origin.path.name,
        "sha256": sha256,
        "name": file.fields.get("general.name"),
        "license": file.fields.get("general.license"),
        "quantisation": file.types,
    }
    with (
        output_lock(output, MADE_BY),
        staged_folder(output, MADE_BY) as staged,
        locations.local_folder() as temporary,
    ):
        folder = locations.local_path(staged) or temporary
        folder.mkdir(parents=True, exist_ok=True)
        _write_model(folder, model, gguf_token_ids(file.fields))
        tokenizer.save(folder)
        job = {"command": "import", "source": origin.name} | identity
        write_made_by(str(folder), made_by(job, {origin.path.name: sha256}))
        _require_loadable(folder, tokenizer)
        warnings = [*_coarse_weights(file), *_wrong_template(folder, output)]
        if folder == temporary:
            locations.upload_folder(folder, staged)
    config = model.config
    return {
        "folder": output, "source": origin.name, **identity, "warning": "; ".join(warnings) or None,
        "architecture": config.architecture, "layers": config.layers, "vocab_size": config.vocab_size,
        "context_len": config.context_len, "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(model.sizes.values()) // model.dtype.itemsize, "tied_head": config.tied_head,
        "chat_templates": list(tokenizer.templates),
    }  # fmt: skip


def _write_model(folder: Path, model: GgufModel, token_ids: dict[str, Any]) -> None:
    sizes = model.sizes
    mebibytes = max(1, sum(sizes.values()) >> 20)
    with job_progress("import", total=mebibytes, unit="MiB") as show:
        write_weights(folder, sizes, _counted(model.read, sizes, show))
    write_config(folder, model.config, model.dtype, token_ids)
    (folder / GENERATION_CONFIG).write_text(json.dumps(token_ids, indent=2) + "\n", encoding="utf-8")


def _counted(
    read: Callable[[str], Tensor], sizes: dict[str, int], show: Callable[[int, dict[str, float]], None]
) -> Callable[[str], Tensor]:
    """A function that reads a tensor and shows how many MiB were read."""
    done = 0

    def counted(name: str) -> Tensor:
        nonlocal done
        value = read(name)
        done += sizes[name]
        show(done >> 20, {})
        return value

    return counted


def _require_loadable(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise an error if the folder that was written does not load as it was meant."""
    check_weights(folder)
    read_end_tokens(folder, eos_id=tokenizer.eos_id, vocab_len=tokenizer.vocab_len)
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint, "the tokenizer changed when it was saved"


def _coarse_weights(file: GgufFile) -> Iterator[str]:
    """A warning if weights have fewer than 8 bits."""
    if coarse := file.coarse_types:
        yield (
            f"{file.path.name} holds {', '.join(coarse)} weights; their rounded values define the AR distribution from "
            "now on; import a file of F16, BF16 or Q8_0 if there is one"
        )


def _wrong_template(folder: Path, output: str) -> Iterator[str]:
    """A warning if the chat template cannot be used. Prompts need none, and the folder's template can be corrected."""
    try:
        load_chat_template(folder)
    except TokenizerError as error:
        yield f"{error} in {output}: until then chats are refused, and a service needs another chat_template"
