"""A served text ends at any of the model's end tokens, unless the request wants none of them."""

import asyncio
from contextlib import aclosing

import pytest
from tiny import varied_model

from serve_apps.messages.generation_request import GenerationRequest, RequestedGrammar
from serve_apps.replica.engine import Engine
from serve_apps.rollout.model_version import resolve_model
from serve_apps.settings import ServeSettings
from serve_apps.tools.offline_generation import OfflineGeneration
from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.text.end_tokens import EndTokens
from tidar_core.config import SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive

PROMPT = "def add(a, b):\n    return"
LENGTH = 30


@pytest.fixture(scope="module")
def model(tokenizer):
    return varied_model(tokenizer)


@pytest.fixture(scope="module")
def endless(model, tokenizer):
    """Tokens of the model without any end."""
    return generate_autoregressive(model, tuple(tokenizer.encode(PROMPT)), SamplingConfig(max_tokens=LENGTH))


@pytest.fixture(scope="module")
def place(endless, tokenizer):
    """First place of a new token that is several letters."""
    letters = {
        token for token in endless if (text := tokenizer.decode([token])).isalpha() and text.isascii() and text[1:]
    }
    return next(n for n, token in enumerate(endless) if n and token not in endless[:n] and token in letters)


@pytest.fixture(scope="module")
def ending(tmp_path_factory, tokenizer, model, endless, place):
    """Location of a bundle with three end tokens; the model generates the last of them."""
    uri = str(tmp_path_factory.mktemp("bundles") / "ending")
    ends = EndTokens((tokenizer.eos_id, tokenizer.special_ids["<|im_start|>"], endless[place]))
    save_bundle(uri, model, tokenizer, block_len=4, mask_id=model.config.mask_id, objective="dual", lineage={},
                made_by={}, ends=ends)  # fmt: skip
    return uri


@pytest.fixture(scope="module")
def engine(ending):
    engine = Engine(resolve_model(ServeSettings(model=ending, mode="single-pass", rows=2, threads=1))[0])
    yield engine
    engine.stop()


def written(engine, *, ignore_eos=False, grammar=None, **sampling):
    """The answer of a replica's engine."""
    request = GenerationRequest(
        request_id="r", prompt=PROMPT, sampling=SamplingConfig(max_tokens=LENGTH, **sampling), ignore_eos=ignore_eos,
        grammar=grammar,
    )  # fmt: skip

    async def deltas():
        async with aclosing(engine.generate(request)) as deltas:
            return [delta async for delta in deltas]

    sent = asyncio.run(deltas())
    piece = sent[-1]._replace(text="".join(delta.text for delta in sent))
    return piece.text, piece.usage.completion_tokens, piece.finish_reason, piece.stop_reason


def test_a_text_ends_at_any_end_token(engine, tokenizer, endless, place):
    expected = (tokenizer.decode(endless[:place]), place + 1, "stop", endless[place])
    assert written(engine) == expected


def test_ignore_eos_ignores_every_end_token(engine, tokenizer, endless):
    assert written(engine, ignore_eos=True) == (tokenizer.decode(endless), LENGTH, "length", None)


def test_no_end_token_comes_before_min_tokens(engine, tokenizer, endless, place):
    text, count, _, _ = written(engine, min_tokens=place + 3)
    assert count >= place + 3
    assert text.startswith(tokenizer.decode(endless[:place]))


def test_a_text_that_keeps_to_a_grammar_ends_with_it_though_an_end_token_spells_a_part_of_it(
    engine, tokenizer, endless, place
):
    word = tokenizer.decode([endless[place]])
    request = RequestedGrammar("guided_choice", "choice", [word + word])
    text, _, reason, _ = written(engine, grammar=request)
    assert (text, reason) == (word + word, "stop")


@pytest.mark.parametrize("mode", ["single-pass", "two-pass", "autoregressive"])
def test_a_text_without_a_service_ends_at_any_end_token(ending, endless, place, mode):
    text = OfflineGeneration(
        load_bundle(ending), ending, {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0}, mode=mode
    )
    for _ in text.deltas():
        pass
    facts = text.figures()
    assert tuple(facts["token_ids"]) == tuple(endless[: place + 1])
    assert (facts["finish_reason"], facts["stop_reason"]) == ("stop", endless[place])
