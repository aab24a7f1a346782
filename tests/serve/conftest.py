"""A tiny bundle with random weights, and the texts of its model, one token at a time."""

import contextlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from chat_templates import chat_tokenizer
from ports import unused_port
from serving import running_service
from tiny import wide_model

from tidar_core.artifacts.model.bundle import save_bundle
from tidar_core.artifacts.model.latency_file import bundle_table
from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.decoder import Decoder
from tidar_core.transformer.shapes import named_shape


@cache
def served_tokenizer():
    return chat_tokenizer("qwen2.5", trained_on=[Path(contextlib.__file__).read_text()])


@cache
def served_model():
    shape = named_shape("tiny", vocab_len=served_tokenizer().vocab_len)
    return wide_model(replace(shape, context_len=4096), seed=5)


@pytest.fixture(scope="session")
def tokenizer():
    return served_tokenizer()


@pytest.fixture(scope="session")
def model():
    return served_model()


@pytest.fixture(scope="session")
def other_model(model):
    """Other weights of the same shape."""
    return wide_model(model.config, seed=6)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, tokenizer, model):
    """Location of the bundle."""
    return saved(tmp_path_factory, tokenizer, model)


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory, tokenizer, other_model):
    """Location of a bundle of the other weights."""
    return saved(tmp_path_factory, tokenizer, other_model)


def saved(tmp_path_factory, tokenizer, model):
    uri = str(tmp_path_factory.mktemp("bundles") / "tiny-model")
    mask_id = model.config.mask_id
    save_bundle(uri, model, tokenizer, block_len=4, mask_id=mask_id, objective="dual", lineage={}, made_by={})
    return uri


@pytest.fixture(scope="session", autouse=True)
def latency_table():
    """Short timings of decode steps in the cache: without them, each start in mode `auto` times for up to 20 s.

    Modules may have a model and a tokenizer of their own, so neither is a fixture here.
    """
    decoder = Decoder(served_model(), DraftConfig(block_len=4), slots=16)
    return bundle_table("a bundle without a table", decoder, budget=1.0)


@pytest.fixture(scope="session")
def registry_uri(tmp_path_factory):
    """A registry for all: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture(scope="module")
def free_port():
    """The port of a module's own service."""
    return unused_port()


@pytest.fixture(scope="session")
def shared_service(ray_cluster, bundle):
    """Base address of the service of `tiny-model` that several modules send requests to."""
    with running_service(bundle) as address:
        yield address


@pytest.fixture(scope="module")
def service(shared_service):
    """Base address of a running service of `tiny-model`; a module with settings of its own overrides this fixture."""
    return shared_service


@pytest.fixture(scope="module")
def client(service):
    """OpenAI's own client of `service`."""
    import openai

    with openai.OpenAI(base_url=f"{service}/v1", api_key="-", max_retries=0) as client:
        yield client


def pytest_collection_modifyitems(items):
    """Run the tests of the shared service last: a cluster runs one service at a time, and it lives until the end."""
    items.sort(key=lambda item: "shared_service" in item.fixturenames)


@pytest.fixture(scope="session")
def oracle_text(model, tokenizer):
    """Text that the plain autoregressive loop gives, with its token count and reason to end."""

    def generate(prompt, max_tokens, ignore_eos=False, model=model, **sampling):
        ids = tuple(tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        eos_ids = () if ignore_eos else (tokenizer.eos_id,)
        config = SamplingConfig(max_tokens=max_tokens, eos_ids=eos_ids, **sampling)
        tokens = generate_autoregressive(model, ids, config)
        stopped = tokens[-1] in eos_ids
        return tokenizer.decode(tokens[:-1] if stopped else tokens), len(tokens), "stop" if stopped else "length"

    return generate
