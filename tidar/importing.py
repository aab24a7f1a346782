"""The command that makes a checkpoint of a model from elsewhere."""

from typing import Annotated

import typer

from tidar.options import Json
from tidar.output import note, print_facts

__all__ = ["import_"]

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="GGUF file, package:NAME that holds one, or a dual-mode model's folder.")
]
Folder = Annotated[
    str, typer.Argument(metavar="FOLDER", help="New folder or URI; an earlier import there is replaced.")
]
MaskToken = Annotated[str | None, typer.Option(metavar="ID|TEXT", help="Mask token of a dual-mode model.")]
BlockLen = Annotated[int | None, typer.Option(min=1, help="Draft block that a dual-mode model was trained with.")]


def import_(
    source: Source, folder: Folder, mask_token: MaskToken = None, block_len: BlockLen = None, as_json: Json = False
) -> None:
    """Make a Hugging Face folder of a GGUF file, or a bundle of a model that others trained as TiDAR."""
    from pipelines.importing.import_model import import_model

    facts = import_model(source, folder, mask_token=mask_token, block_len=block_len)
    if warning := facts.get("warning"):
        note(f"Warning: {warning}")
    print_facts({name: value for name, value in facts.items() if as_json or name != "warning"}, as_json)
