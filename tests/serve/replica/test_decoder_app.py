"""One replica, without Ray around it: whole bundles in, pieces of text out."""

import asyncio
import dataclasses
import threading
from contextlib import aclosing

import pytest
from llguidance import LLParserLimits, grammar_from

from serve_apps.api.completion_response import metrics_of
from serve_apps.messages.generation_request import GenerationRequest, RequestedGrammar
from serve_apps.messages.text_delta import GenerationFailed
from serve_apps.replica.decoder_app import DecoderApp
from serve_apps.rollout.model_version import ModelVersion
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.model.bundle_info import read_bundle_info
from tidar_core.artifacts.text.grammar import Grammar
from tidar_core.config import SamplingConfig
from tidar_core.errors import BundleError, CapacityError, ConfigError, ContextLengthError, TidarError

PROMPT = "def add(a, b):\n    return"


@pytest.fixture
def served(bundle):
    settings = ServeSettings(model=bundle, mode="single-pass", rows=2, own_process=False)
    return ModelVersion(
        settings=settings, bundle_uri=bundle, bundle_hash=read_bundle_info(bundle).bundle_hash, block_len=4
    )


def with_settings(served, block_len=4, **changes):
    settings = served.settings.model_copy(update=changes)
    return dataclasses.replace(served, settings=settings, block_len=block_len)


def prompt_request(max_tokens=20, pieces=True, **sampling):
    return GenerationRequest(
        request_id="r", prompt=PROMPT, sampling=SamplingConfig(max_tokens=max_tokens, **sampling), pieces=pieces
    )


async def collected(app, request):
    return [event async for event in app.generate(request)]


def answer(app, request):
    return asyncio.run(collected(app, request))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize(("mode", "block_len"), [("single-pass", 4), ("single-pass", 2), ("autoregressive", 1)])
def test_in_every_mode_the_pieces_join_to_the_autoregressive_text(served, oracle_text, mode, block_len, sampling):
    app = DecoderApp(with_settings(served, block_len, mode=mode))
    pieces = answer(app, prompt_request(**sampling))
    text, tokens, reason = oracle_text(PROMPT, 20, **sampling)
    assert "".join(piece.text for piece in pieces) == text
    assert (pieces[-1].finish_reason, pieces[-1].usage.completion_tokens) == (reason, tokens)
    assert (metrics_of(pieces[-1].usage) is None) == (block_len == 1)


def test_sampled_drafts_are_greedy_too_if_requested(served, oracle_text):
    app = DecoderApp(with_settings(served, draft_kind="sampled"))
    assert "".join(p.text for p in answer(app, prompt_request())) == oracle_text(PROMPT, 20)[0]


def test_who_wants_no_pieces_gets_all_text_at_the_end(served, oracle_text):
    *admitted, last = answer(DecoderApp(served), prompt_request(pieces=False))
    assert len(admitted) == 1
    assert "".join(p.text for p in [*admitted, last]) == oracle_text(PROMPT, 20)[0]


def test_a_refusal_is_an_event(served):
    (refused,) = answer(DecoderApp(served), prompt_request(max_tokens=5000))
    assert isinstance(refused, GenerationFailed)
    assert isinstance(refused.error, ContextLengthError)


@pytest.mark.parametrize(("mode", "block_len"), [("single-pass", 4), ("autoregressive", 1)])
def test_a_grammar_that_takes_too_much_work_fails_the_request_instead_of_ending_its_text(
    served, monkeypatch, mode, block_len
):
    def narrow(kind, content, tokenizer):
        return Grammar(grammar_from(kind, content), tokenizer, LLParserLimits(step_max_items=40, verbose_errors=False))

    monkeypatch.setattr("serve_apps.replica.prompt_encoder.compile_constraint", narrow)
    grammar = RequestedGrammar("guided_grammar", "grammar", 'start: x\nx: x x | "a" | "aa" | "b"')
    requested = dataclasses.replace(prompt_request(max_tokens=60, min_tokens=60), grammar=grammar)
    *_, refused = answer(DecoderApp(with_settings(served, block_len, mode=mode)), requested)
    assert isinstance(refused, GenerationFailed)
    assert (refused.error.param, refused.error.code) == ("guided_grammar", None)
    assert "Too many items" in str(refused.error)


def test_a_shorter_context_is_the_one_that_counts(served):
    app = DecoderApp(with_settings(served, context_len=30))
    assert isinstance(answer(app, prompt_request(max_tokens=25))[-1], GenerationFailed)
    assert not isinstance(answer(app, prompt_request(max_tokens=5))[-1], GenerationFailed)


def test_a_new_replica_is_idle_and_healthy(served):
    app = DecoderApp(served)
    asyncio.run(app.check_health())
    assert asyncio.run(app.ready())
    load = asyncio.run(app.load())
    assert (load.running, load.waiting, load.pages_held, load.preemptions, load.shared_tokens) == (0, 0, 0, 0, 0)
    assert (load.mode, load.expected_over_ar) == ("single-pass", None)


def test_its_settings_limit_the_tokens_that_may_wait(served):
    app = DecoderApp(with_settings(served, rows=1, max_waiting_tokens=1))

    async def crowd():
        first = app.generate(dataclasses.replace(prompt_request(max_tokens=4000), request_id="first"))
        async with aclosing(first) as pieces:
            await anext(pieces)
            while not (await app.load()).running:
                await asyncio.sleep(0.001)
            return await collected(app, prompt_request())

    (refused,) = asyncio.run(crowd())
    assert isinstance(refused.error, CapacityError)
    assert "tokens would wait" in str(refused.error)


def test_a_replica_whose_decoder_hangs_or_fails_is_not_healthy(served, monkeypatch):
    app = DecoderApp(with_settings(served, hang_seconds=0.1))
    going_on = threading.Event()
    monkeypatch.setattr(app.pool.champion.engine.scheduler, "prefill", lambda **_: going_on.wait() / 0)
    with pytest.raises(RuntimeError, match=r"no forward of the decoder has ended for 0\.1 s"):
        asyncio.run(app.check_health())
    going_on.set()
    app = DecoderApp(served)
    monkeypatch.setattr(app.pool.champion.engine.scheduler, "prefill", lambda **_: 1 / 0)
    with pytest.raises(TidarError, match="ZeroDivisionError"):
        asyncio.run(app.check_health())


def test_a_replica_sends_its_load_to_the_scaling_policy(served):
    app = DecoderApp(served)
    assert asyncio.run(app.record_autoscaling_stats()) == {"rows": 0, "kv": 0, "waiting_tokens": 0}
    answer(app, prompt_request())
    stats_sent = asyncio.run(app.record_autoscaling_stats())
    assert stats_sent["tokens_per_forward"] > 1
    assert stats_sent["forwards_per_second"] > 0


def test_with_few_pages_texts_are_the_same_and_young_texts_are_preempted(served, oracle_text):
    app = DecoderApp(with_settings(served, pages=5, context_len=64, rows=3))

    async def together():
        requests = [dataclasses.replace(prompt_request(max_tokens=40), request_id=str(i)) for i in range(3)]
        return await asyncio.gather(*[collected(app, request) for request in requests])

    expected = oracle_text(PROMPT, 40)[0]
    assert {"".join(piece.text for piece in pieces) for pieces in asyncio.run(together())} == {expected}
    load = asyncio.run(app.load())
    assert load.pages == 5
    assert load.preemptions > 0
    assert load.pages_held == 0


def test_fewer_pages_than_one_context_takes_are_refused(served):
    with pytest.raises(ConfigError, match="pages"):
        DecoderApp(with_settings(served, pages=5))


def test_in_auto_mode_a_replica_reports_the_choice_and_the_expectation_of_its_planner(served):
    app = DecoderApp(with_settings(served, mode="auto", context_len=64))
    answer(app, prompt_request())
    load = asyncio.run(app.load())
    assert load.mode in ("single-pass", "two-pass", "autoregressive")
    assert load.expected_over_ar >= 1 / 1.03  # hysteresis keeps a choice that is no more than that much worse


def test_a_prompt_that_came_before_is_not_read_again(served):
    app = DecoderApp(with_settings(served))
    for _ in range(2):
        answer(app, dataclasses.replace(prompt_request(), prompt=tuple(range(1, 60))))
    assert asyncio.run(app.load()).shared_tokens == 48  # three pages of 16


def test_a_bundle_that_is_no_longer_the_one_looked_up_is_refused(served):
    with pytest.raises(BundleError, match="restart"):
        DecoderApp(dataclasses.replace(served, bundle_hash="0" * 64))


def test_a_gpu_that_is_not_there_is_refused(served):
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="num_gpus"):
            DecoderApp(with_settings(served, num_gpus=1))


def test_tokens_of_texts_without_drafts_are_counted_apart_from_those_of_a_version(served):
    app = DecoderApp(served)
    plain = answer(app, dataclasses.replace(prompt_request(12), speculative=False))[-1].usage
    drafted = answer(app, prompt_request(12))[-1].usage
    assert not sum(plain.histogram)  # no draft was verified
    (report,) = asyncio.run(app.versions())
    totals = report.totals
    assert totals.plain_tokens == plain.completion_tokens
    assert totals.tokens == plain.completion_tokens + drafted.completion_tokens
    forwards = totals.forwards - plain.completion_tokens  # each of them took one
    assert totals.tokens_per_forward == drafted.completion_tokens / forwards
