"""Import of a dual-mode checkpoint of another project: a bundle with its mask token.

A mask token of ours is an entry of the vocabulary that no text can contain. If the checkpoint's mask token is a token
of its tokenizer, a free entry gets the same embedding, and the token stays as it is. If all entries are used, the table
grows by one. The AR distribution stays that of the checkpoint.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.importing.sources import Origin
from tidar_core.artifacts.model.bundle import save_bundle
from tidar_core.artifacts.model.bundle_info import BUNDLE_JSON, is_bundle
from tidar_core.artifacts.model.checkpoint import checkpoint_files, content_hash
from tidar_core.artifacts.model.hf_files import stored_tensors
from tidar_core.artifacts.model.hf_weights import check_weights, load_model, require_embeddings
from tidar_core.artifacts.store.output_lock import output_lock
from tidar_core.artifacts.store.provenance import made_by
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.end_tokens import read_end_tokens
from tidar_core.artifacts.text.tokenizer import Tokenizer, load_tokenizer
from tidar_core.config import DraftConfig, ModelConfig
from tidar_core.errors import BundleError, UserError
from tidar_core.transformer.model import TidarModel

__all__ = ["import_dual_mode"]


def import_dual_mode(origin: Origin, output: str, *, mask_token: str, block_len: int) -> dict[str, Any]:
    """Write the bundle of a checkpoint that was trained as TiDAR, and return facts for a person.

    mask_token  id or text of its mask token
    block_len   tokens in a draft block of its training
    """
    folder = origin.path
    if is_bundle(folder):
        raise BundleError(f"{origin.name} is a bundle already; give it to generate, bench, evaluate or serve")
    DraftConfig(block_len=block_len)
    tokenizer, config = load_tokenizer(folder), check_weights(folder)
    load_chat_template(folder)  # a wrong template is refused here: the files of a bundle cannot be corrected later
    require_embeddings(config, tokenizer.vocab_len)
    token_id = _token_id(mask_token, tokenizer, config)
    ends = read_end_tokens(folder, eos_id=tokenizer.eos_id, vocab_len=tokenizer.vocab_len)
    if token_id in ends.ids:
        raise UserError(f"--mask-token {mask_token} is an end token of {origin.name}; give the token that masks have")
    with output_lock(output, BUNDLE_JSON):
        parents = {"start": content_hash(checkpoint_files(folder))}
        model = load_model(folder, dtype=_dtype(folder))
        mask_id = max(token_id, tokenizer.vocab_len)
        model = _with_mask(model, token_id, mask_id)
        job = {"command": "import", "source": origin.name, "mask_token": mask_token, "block_len": block_len}
        info = save_bundle(
            output, model, tokenizer, block_len=block_len, mask_id=mask_id, objective="dual",
            lineage=parents, made_by=made_by(job, parents), ends=ends,
        )  # fmt: skip
    return {
        "bundle": output, "bundle_hash": info.bundle_hash, "source": origin.name, "block_len": block_len,
        "mask_id": mask_id, "mask_token_id": token_id, "architecture": config.architecture,
        "vocab_size": model.config.vocab_size, "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "chat_templates": list(tokenizer.templates),
    }  # fmt: skip


def _token_id(mask_token: str, tokenizer: Tokenizer, config: ModelConfig) -> int:
    """The id of the mask token that its user named by id or text."""
    if not mask_token.isascii() or not mask_token.isdigit():
        token_id = tokenizer.id_of(mask_token)
        if token_id is None:
            raise UserError(f"--mask-token {mask_token!r} is no token of the tokenizer; give its exact text, or its id")
        return token_id
    if int(mask_token) >= config.vocab_size:
        raise UserError(f"--mask-token is {mask_token}; the vocabulary has ids 0..{config.vocab_size - 1}; give its id")
    return int(mask_token)


def _with_mask(model: TidarModel, token_id: int, mask_id: int) -> TidarModel:
    """The model with a mask token at `mask_id` that has the embedding of `token_id`. Other weights are shared."""
    size = max(model.config.vocab_size, mask_id + 1)
    with torch.device("meta"):
        masked = TidarModel(replace(model.config, vocab_size=size, mask_id=mask_id))
    state = model.state_dict()
    for name in ("embedding.weight", "head.weight"):
        state[name] = _with_entry(state[name], token_id, mask_id, size)
    masked.load_state_dict(state, assign=True)
    masked.tie()
    return masked.eval()


def _with_entry(table_VE: Tensor, token_id: int, mask_id: int, size: int) -> Tensor:
    if token_id == mask_id:
        return table_VE
    grown_VE = table_VE.new_zeros(size, table_VE.shape[1])
    grown_VE[: len(table_VE)] = table_VE
    grown_VE[mask_id] = table_VE[token_id]
    return grown_VE


def _dtype(folder: Path) -> torch.dtype:
    """The dtype that holds the stored weights exactly and that a model can be checked in."""
    stored = {tensor.dtype for tensor in stored_tensors(folder).values()}
    return torch.bfloat16 if stored == {"BF16"} else torch.float32
