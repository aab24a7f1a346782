"""One replica, without Ray around it: whole bundles in, pieces of text out."""

import asyncio
import dataclasses

import pytest

from serve_apps.decoder_app import DecoderApp, Load, Served
from serve_apps.events import Failed
from serve_apps.schemas import PromptRequest
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.bundle import read_bundle_info
from tidar_core.config import SamplingConfig
from tidar_core.errors import BundleError, ConfigError, ContextLengthError

PROMPT = "def add(a, b):\n    return"


@pytest.fixture
def served(bundle):
    settings = ServeSettings(model=bundle, rows=2)
    return Served(settings=settings, bundle_uri=bundle, bundle_hash=read_bundle_info(bundle).bundle_hash, block_len=4)


def with_settings(served, block_len=4, **changes):
    settings = served.settings.model_copy(update=changes)
    return dataclasses.replace(served, settings=settings, block_len=block_len)


def prompt_request(max_tokens=20, pieces=True, **sampling):
    return PromptRequest(
        request_id="r", prompt=PROMPT, sampling=SamplingConfig(max_tokens=max_tokens, **sampling), pieces=pieces
    )


def answer(app, request):
    async def collect():
        return [event async for event in app.generate(request)]

    return asyncio.run(collect())


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize(("mode", "block_len"), [("single-pass", 4), ("single-pass", 2), ("autoregressive", 1)])
def test_in_every_mode_the_pieces_join_to_the_autoregressive_text(
    served, said_by_the_oracle, mode, block_len, sampling
):
    app = DecoderApp(with_settings(served, block_len, mode=mode))
    pieces = answer(app, prompt_request(**sampling))
    text, tokens, reason = said_by_the_oracle(PROMPT, 20, **sampling)
    assert "".join(piece.text for piece in pieces) == text
    assert (pieces[-1].finish_reason, pieces[-1].tally.completion_tokens) == (reason, tokens)
    assert (pieces[-1].tally.metrics() is None) == (block_len == 1)


def test_sampled_drafts_are_greedy_too_where_that_is_asked(served, said_by_the_oracle):
    app = DecoderApp(with_settings(served, draft_kind="sampled"))
    assert "".join(p.text for p in answer(app, prompt_request())) == said_by_the_oracle(PROMPT, 20)[0]


def test_who_wants_no_pieces_gets_all_text_at_the_end(served, said_by_the_oracle):
    *admitted, last = answer(DecoderApp(served), prompt_request(pieces=False))
    assert len(admitted) == 1
    assert "".join(p.text for p in [*admitted, last]) == said_by_the_oracle(PROMPT, 20)[0]


def test_a_refusal_is_an_event(served):
    (refused,) = answer(DecoderApp(served), prompt_request(max_tokens=5000))
    assert isinstance(refused, Failed)
    assert isinstance(refused.error, ContextLengthError)


def test_a_shorter_context_is_the_one_that_counts(served):
    app = DecoderApp(with_settings(served, context_len=30))
    assert isinstance(answer(app, prompt_request(max_tokens=25))[-1], Failed)
    assert not isinstance(answer(app, prompt_request(max_tokens=5))[-1], Failed)


def test_a_new_replica_is_idle_and_healthy(served):
    app = DecoderApp(served)
    app.check_health()
    assert asyncio.run(app.ready())
    assert asyncio.run(app.load()) == Load(running=0, waiting=0)


def test_a_bundle_that_is_no_longer_the_one_looked_up_is_refused(served):
    with pytest.raises(BundleError, match="restart"):
        DecoderApp(dataclasses.replace(served, bundle_hash="0" * 64))


def test_a_gpu_that_is_not_there_is_refused(served):
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="num_gpus"):
            DecoderApp(with_settings(served, num_gpus=1))
