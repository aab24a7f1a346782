"""Bundles: folders that training writes and serving loads, verified by hashes.

What does serving load, and is it what training left?

A checkpoint, i.e. a Hugging Face folder without tidar.json, loads as well: as a bundle that does not draft.

A bundle is a Hugging Face model folder with a few files of ours:

    config.json, model*.safetensors, tokenizer files      opened unchanged by transformers, vLLM, SGLang (AR mode)
    generation_config.json                                copy of the start model's, if any; may name more end tokens
    tidar_link.tensors                                    weights of the draft link, if the model has one
    made_by.json                                          the job that made it and its parents
    tidar.json                                            block length, mask id, lineage, the hash of every other file

A bundle of a frozen checkpoint holds the checkpoint's files as they are, or names their address, and its drafts:

    drafts/drafts.safetensors                             adapter and link

Drafts can be exchanged alone (`load_drafts`) under a checkpoint that is loaded.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidar_core.artifacts.model.bundle_info import (
    BUNDLE_JSON,
    FORMAT_VERSION,
    FROZEN_FORMAT_VERSION,
    REFETCH,
    BundleInfo,
    DraftsInfo,
    base_location,
    bundle_hash,
    info_of,
    is_bundle,
    model_info,
    require_file,
    verify_bundle,
)
from tidar_core.artifacts.model.checkpoint import checkpoint_files, content_hash
from tidar_core.artifacts.model.drafts_file import DRAFTS, attach_drafts, save_drafts
from tidar_core.artifacts.model.finite import require_finite, require_finite_weights
from tidar_core.artifacts.model.hf_config import read_config, read_settings
from tidar_core.artifacts.model.hf_files import float_tensors, read_tensor
from tidar_core.artifacts.model.hf_weights import load_model, require_embeddings, save_model
from tidar_core.artifacts.model.quantised import is_quantised
from tidar_core.artifacts.store import locations, output_folder
from tidar_core.artifacts.store.provenance import write_made_by
from tidar_core.artifacts.text.end_tokens import GENERATION_CONFIG, EndTokens, read_end_tokens
from tidar_core.artifacts.text.tokenizer import TOKENIZER_JSON, Tokenizer, load_tokenizer
from tidar_core.errors import BundleError, ConfigError
from tidar_core.kernels.linear import prepare_for_decoding
from tidar_core.transformer.model import TidarModel

__all__ = ["DTYPES", "Bundle", "load_bundle", "load_drafts", "load_for_decoding", "save_bundle", "save_frozen_bundle"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes that weights can be loaded in, by the names that users give."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model that is ready to decode, and the tokenizer of its ids."""

    model: TidarModel
    tokenizer: Tokenizer
    info: BundleInfo
    end_ids: tuple[int, ...]
    """Tokens that end a text, the tokenizer's end-of-text token first."""


def save_bundle(
    uri: str,
    model: TidarModel,
    tokenizer: Tokenizer,
    *,
    block_len: int,
    mask_id: int,
    objective: str,
    lineage: Mapping[str, Any],
    made_by: Mapping[str, Any],
    ends: EndTokens | None = None,
) -> BundleInfo:
    """Write a whole bundle at `uri`, in place of an older bundle.

    Raises BundleError if a weight or logit is not finite, or if `mask_id` is a token of the tokenizer.

    ends  end tokens of the model; None: the tokenizer's end-of-text token alone
    """
    ends = ends or EndTokens((tokenizer.eos_id,))
    _refuse_textual_mask(uri, mask_id, tokenizer)
    require_finite(model, uri)
    with output_folder.staged_folder(uri, BUNDLE_JSON) as staged, locations.local_folder() as temporary:
        folder = locations.local_path(staged) or temporary
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, folder, end_ids=ends.ids)
        if ends.generation_config is not None:
            (folder / GENERATION_CONFIG).write_text(ends.generation_config, encoding="utf-8")
        tokenizer.save(folder)
        info = {"block_len": block_len, "mask_id": mask_id, "objective": objective, "lineage": dict(lineage)}
        return _sealed(folder, {"format_version": FORMAT_VERSION, **info}, made_by, staged)


def save_frozen_bundle(
    uri: str,
    model: TidarModel,
    checkpoint: str,
    *,
    block_len: int,
    lineage: Mapping[str, Any],
    made_by: Mapping[str, Any],
    base_uri: str | None = None,
) -> BundleInfo:
    """Write the drafts of a frozen checkpoint as a bundle at `uri`, in place of an older bundle.

    Raises BundleError if a weight or logit is not finite, or if the files at `base_uri` differ from the checkpoint's.

    checkpoint  folder of the checkpoint: its files are copied as they are
    base_uri    address of the same files, which the bundle names instead of holding a copy
    """
    require_finite(model, uri)
    assert model.config.adapter is not None, "the model has no draft adapter"
    base_uri = None if base_uri is None else locations.absolute(base_uri)
    source = locations.local_copy(checkpoint)
    files = checkpoint_files(source)
    drafts = DraftsInfo(
        adapter=model.config.adapter, link_rank=model.config.link_rank, base_hash=content_hash(files), base_uri=base_uri
    )
    if base_uri is not None:
        _require_base(uri, drafts, checkpoint_files(locations.local_copy(base_uri)))
    with output_folder.staged_folder(uri, BUNDLE_JSON) as staged, locations.local_folder() as temporary:
        folder = locations.local_path(staged) or temporary
        folder.mkdir(parents=True, exist_ok=True)
        for name in files if base_uri is None else ():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        save_drafts(model, folder)
        info = {"block_len": block_len, "mask_id": None, "objective": "dual", "lineage": dict(lineage)}
        info |= {"format_version": FROZEN_FORMAT_VERSION, "drafts": drafts.values()}
        return _sealed(folder, info, made_by, staged)


def load_bundle(
    uri: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    verify: bool = True,
    tokenizer: Tokenizer | None = None,
) -> Bundle:
    """Load the bundle or the checkpoint at `uri` onto `device`. A folder in an object store is downloaded first, once.

    Raises BundleError for a model whose weights or logits are not finite.

    verify     compare every file of a bundle with its hash before any file is loaded
    tokenizer  tokenizer of a folder that holds no tokenizer.json
    """
    folder = locations.local_copy(str(uri))
    info = verify_bundle(folder) if verify and is_bundle(folder) else model_info(folder)
    base = locations.local_copy(base_location(folder, info))
    if info.drafts is not None and verify:
        _require_base(str(uri), info.drafts, checkpoint_files(base))
    if tokenizer is None or (base / TOKENIZER_JSON).is_file():
        tokenizer = load_tokenizer(base)
    if info.mask_id is not None:
        _refuse_textual_mask(str(uri), info.mask_id, tokenizer)
    require_embeddings(read_config(base), tokenizer.vocab_len)
    model = load_model(base, dtype=dtype, device=device, mask_id=info.mask_id)
    if info.drafts is not None:
        attach_drafts(model, folder, info.drafts)
    require_finite(model, str(uri))
    ends = read_end_tokens(base, eos_id=tokenizer.eos_id, vocab_len=tokenizer.vocab_len)
    return Bundle(model, tokenizer, info, ends.ids)


def load_for_decoding(
    uri: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    weights: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Bundle:
    """Load like `load_bundle`, with the weights laid out for decoding; the model can neither be trained nor saved.

    weights  int8 or int4: weights are rounded to so many bits. Raises ConfigError where that is not possible.
    """
    if weights is not None:
        _refuse_quantised(str(uri), weights)
    bundle = load_bundle(uri, dtype, device, tokenizer=tokenizer)
    prepare_for_decoding(bundle.model, weights)
    return bundle


def load_drafts(uri: str, info: BundleInfo, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Read the weights of adapter and link from the bundle at `uri`, by name; no other weights are downloaded.

    Raises BundleError if the drafts are damaged or not finite.
    """
    folder, name = DRAFTS.split("/")
    if not locations.exists(locations.join(uri, DRAFTS)):
        raise BundleError(f"{uri} holds no {DRAFTS}; {REFETCH}")
    path = locations.local_copy(locations.join(uri, folder)) / name
    require_file(locations.join(uri, DRAFTS), str(path), info.files.get(DRAFTS, ""))
    weights = {name: read_tensor(name, path).to(dtype) for name in float_tensors(path)}
    require_finite_weights(weights, uri)
    return weights


def _sealed(folder: Path, info: dict[str, Any], made_by: Mapping[str, Any], staged: str) -> BundleInfo:
    """Write tidar.json and made_by.json of a bundle whose other files are there."""
    write_made_by(str(folder), made_by)
    info["files"] = {entry.name: locations.sha256(entry.uri) for entry in locations.list_files(str(folder))}
    info["bundle_hash"] = bundle_hash(info)
    locations.write_json(str(folder / BUNDLE_JSON), info)
    if locations.local_path(staged) is None:
        locations.upload_folder(folder, staged)
    return info_of(info)


def _require_base(uri: str, drafts: DraftsInfo, files: dict[str, str]) -> None:
    """Raise BundleError if these are not the files of the checkpoint that the drafts were trained for."""
    if (found := content_hash(files)) != drafts.base_hash:
        raise BundleError(
            f"the checkpoint at {drafts.base_uri or uri} has hash {found[:12]}; the drafts of {uri} were trained for "
            f"{drafts.base_hash[:12]}; give that checkpoint, or train drafts for this one"
        )


def _refuse_quantised(uri: str, weights: str) -> None:
    folder = locations.local_copy(uri)
    if is_quantised(read_settings(locations.local_copy(base_location(folder, model_info(folder))))):
        raise ConfigError(f"weights is {weights}, and the weights of {uri} are quantised already; leave weights out")


def _refuse_textual_mask(uri: str, mask_id: int, tokenizer: Tokenizer) -> None:
    if mask_id < tokenizer.vocab_len:
        raise BundleError(
            f"mask_id of {uri} is {mask_id}, a token of its tokenizer; it must be an unused id, "
            f"{tokenizer.vocab_len} or above"
        )
