"""Bundles of a frozen checkpoint with random drafts."""

from dataclasses import replace

import torch

from tidar_core.artifacts.model.bundle import load_bundle, save_frozen_bundle
from tidar_core.config import AdapterConfig
from tidar_core.transformer.draft_adapter import DRAFT_WEIGHTS, DraftAdapter
from tidar_core.transformer.draft_link import DraftLink


def save_drafts_bundle(folder, checkpoint, *, seed, base_uri=None, rank=4, link_rank=4, **choices):
    """A bundle of the checkpoint in a folder, K = 4.

    base_uri  address of the checkpoint that the bundle names; by default it holds a copy
    choices   further fields of the adapter's config
    """
    model, generator = load_bundle(checkpoint).model, torch.Generator().manual_seed(seed)
    model.config = replace(model.config, adapter=AdapterConfig(rank=rank, block_len=4, **choices), link_rank=link_rank)
    model.adapter, model.link = DraftAdapter(model.config), DraftLink(model.config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(DRAFT_WEIGHTS):
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    save_frozen_bundle(
        str(folder), model, str(checkpoint), block_len=4, lineage={"start": str(seed)}, made_by={}, base_uri=base_uri
    )
    return str(folder)
