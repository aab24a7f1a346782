"""Drafts of a frozen checkpoint in a bundle: adapter and link, without the checkpoint.

Which drafts belong to which checkpoint, and how do both become one model?

The weights lie in a folder of their own: servers such as vLLM would take a file beside the checkpoint's for its
weights. The file tidar.json has their shape, and the content hash of the checkpoint that they were trained for.
"""

from pathlib import Path

import torch

from tidar_core.artifacts.model.bundle_info import DraftsInfo
from tidar_core.artifacts.model.hf_files import float_tensors, read_tensor
from tidar_core.artifacts.model.hf_writer import write_tensors
from tidar_core.transformer.draft_adapter import DRAFT_WEIGHTS, DraftAdapter, require_same_shapes
from tidar_core.transformer.draft_link import DraftLink
from tidar_core.transformer.model import TidarModel

__all__ = ["DRAFTS", "attach_drafts", "save_drafts"]

DRAFTS = "drafts/drafts.safetensors"


def save_drafts(model: TidarModel, folder: Path) -> None:
    """Write adapter and link of a model into an existing folder. Raises StorageError if there is no room."""
    assert model.config.adapter is not None, "the model has no draft adapter"
    (folder / DRAFTS).parent.mkdir(exist_ok=True)
    weights = {name: value.detach() for name, value in model.named_parameters() if name.startswith(DRAFT_WEIGHTS)}
    write_tensors(weights, folder / DRAFTS)


def attach_drafts(model: TidarModel, folder: Path, drafts: DraftsInfo) -> None:
    """Give a checkpoint's model the adapter and the link in a folder, in the model's dtype and on its device.

    Raises WeightsError if a tensor is missing, not used or of another shape.
    """
    config, table, path = drafts.config(model.config), model.embedding.weight, folder / DRAFTS
    with torch.device("meta"):
        adapter = DraftAdapter(config)
        link = DraftLink(config) if config.link_rank else None
    wanted = {f"adapter.{name}": value for name, value in adapter.named_parameters()}
    if link is not None:
        wanted |= {f"link.{name}": value for name, value in link.named_parameters()}
    found = float_tensors(path)
    require_same_shapes(path, found, wanted)
    model.config, model.adapter, model.link = config, adapter, link
    state = {name: read_tensor(name, path).to(table.device, table.dtype) for name in found}
    model.load_state_dict(state, strict=False, assign=True)
    model.eval()
