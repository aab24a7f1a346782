"""A tiny bundle with random weights, and what its model says one token at a time."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import wide_model

from tidar_core.artifacts.bundle import save_bundle
from tidar_core.artifacts.tokenizer import train_bpe
from tidar_core.autoregressive import generate_autoregressive
from tidar_core.config import SamplingConfig
from tidar_core.shapes import named_shape


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe([Path(contextlib.__file__).read_text()], 300)


@pytest.fixture(scope="session")
def model(tokenizer):
    shape = named_shape("tiny", vocab_len=tokenizer.vocab_len)
    return wide_model(replace(shape, context_len=4096), seed=5)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, tokenizer, model):
    """Location of the bundle."""
    uri = str(tmp_path_factory.mktemp("bundles") / "tiny-model")
    mask_id = model.config.mask_id
    save_bundle(uri, model, tokenizer, block_len=4, mask_id=mask_id, objective="dual", lineage={}, made_by={})
    return uri


@pytest.fixture(scope="session")
def said_by_the_oracle(model, tokenizer):
    """Text that the plain autoregressive loop gives, with its token count and reason to end."""

    def say(prompt, max_tokens, ignore_eos=False, **sampling):
        ids = tuple(tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        eos_ids = () if ignore_eos else (tokenizer.eos_id,)
        config = SamplingConfig(max_tokens=max_tokens, eos_ids=eos_ids, **sampling)
        tokens = generate_autoregressive(model, ids, config)
        stopped = tokens[-1] in eos_ids
        return tokenizer.decode(tokens[:-1] if stopped else tokens), len(tokens), "stop" if stopped else "length"

    return say
