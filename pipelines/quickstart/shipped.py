"""Drafts of SmolLM2-135M-Instruct that the project ships.

Which drafts does the quickstart's training start from?

The folder `shipped` has tidar.json and the drafts of a bundle, in bf16, without the checkpoint. infra/jobs has the jobs
that made it: *.smollm2.yaml. `python -m pipelines.quickstart.shipped BUNDLE` replaces it.
"""

import sys
from pathlib import Path

import torch

from pipelines.cluster.console import stderr
from tidar_core.artifacts.model.bundle_info import BUNDLE_JSON, bundle_hash, model_info, read_bundle_info
from tidar_core.artifacts.model.drafts_file import DRAFTS
from tidar_core.artifacts.model.hf_files import float_tensors, read_tensor
from tidar_core.artifacts.model.hf_writer import write_tensors
from tidar_core.artifacts.store import locations
from tidar_core.errors import ConfigError

__all__ = ["SHIPPED", "drafts_of", "ship"]

SHIPPED = Path(__file__).parent / "shipped"


def drafts_of(base: str) -> str | None:
    """The shipped folder, if its drafts were trained for the checkpoint at `base`.

    Otherwise None, and one line on standard error.
    """
    drafts = read_bundle_info(SHIPPED).drafts
    assert drafts is not None, "the shipped folder has drafts"
    if (found := model_info(base).bundle_hash) == drafts.base_hash:
        return str(SHIPPED)
    stderr.print(
        f"the shipped drafts are of checkpoint {drafts.base_hash[:12]} and this one is {found[:12]}; training starts "
        "from none",
        highlight=False,
    )
    return None


def ship(bundle: str, folder: Path = SHIPPED) -> None:
    """Write tidar.json and the drafts of a bundle to `folder`. Raises ConfigError for a bundle without an adapter."""
    source, info = locations.local_copy(bundle), read_bundle_info(bundle)
    if info.drafts is None:
        raise ConfigError(f"{bundle} holds no drafts of a frozen checkpoint; give a bundle of drafts: adapter")
    path = folder / DRAFTS
    path.parent.mkdir(parents=True, exist_ok=True)
    names = float_tensors(source / DRAFTS)
    write_tensors({name: read_tensor(name, source / DRAFTS).to(torch.bfloat16) for name in names}, path)
    values = locations.read_json(f"{bundle}/{BUNDLE_JSON}")
    values["drafts"]["base_uri"] = None
    values["files"] = {DRAFTS: locations.sha256(str(path))}
    values["bundle_hash"] = bundle_hash(values)
    locations.write_json(str(folder / BUNDLE_JSON), values)


if __name__ == "__main__":
    ship(sys.argv[1])
