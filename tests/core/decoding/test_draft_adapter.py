"""Drafts of an adapter change no text, and decoding reads masks as training laid them out."""

from dataclasses import replace

import pytest
import torch
from decoding import GREEDY, RandomPlanner, expected_texts, prefilled, prompts, requests
from replay import StandInRecorder
from tiny import adapted_model

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.completion import complete
from tidar_core.decoding.cuda_graphs import StepGraphs
from tidar_core.decoding.decode_forward import DecodeForward, QueryTokens
from tidar_core.decoding.decode_step import DecodeTuning
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.plan_tensors import QueryPattern
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import MODES, FixedMode, StepPlan
from tidar_core.errors import WeightsError
from tidar_core.planning.latency_formula import LatencyPoint
from tidar_core.planning.latency_table import LatencyTable
from tidar_core.planning.planner import AutoPlanner
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.draft_adapter import DRAFT_WEIGHTS
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.layout import decode_layout

K = 4
SAMPLED = SamplingConfig(max_tokens=24, temperature=1.0, top_k=50, seed=6)


KINDS = {"plain": {}, "shifted": {"shifted": True}, "causal": {"causal": True},
         "link of state": {"link_reads_state": True}, "link through tables": {"link_shares_tables": True}}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def adapted(request):
    return adapted_model(link_rank=4, **request.param)


@torch.no_grad()
def test_a_forward_over_the_cache_equals_a_fresh_forward_of_text_and_one_block(adapted):
    prompt, drafts = prompts(9)[0], prompts(K, seed=1)[0]
    cache, table = KVCache(adapted.config, pages=8, page_len=4), torch.tensor([[7, 2, 5, 1, 8]])
    read = DecodeForward(adapted, cache, positions=40, block_len=K)
    for tokens, start, groups in ((prompt, 0, ()), (drafts, 9, (1, 2, 3, 4))):
        pattern = QueryPattern.of(len(tokens), groups, K, table.device, causal_masks=adapted.config.causal_masks)
        rows = QueryTokens(table, torch.tensor([start]), torch.tensor([tokens]), pattern, -(-start // 4))
        hidden = read(rows)[0][0]
    for g in range(1, K + 1):
        text = (*prompt, *drafts[:g])
        fresh = decode_layout(torch.tensor([0]), len(text), (len(text),), K, causal_masks=adapted.config.causal_masks)
        rows = torch.tensor([[*text, *[0] * K]])
        expected = adapted.adapted(rows, fresh.position, DenseAttention(fresh), torch.arange(K)[None])[0]
        # fp32, keys and products summed in another order
        torch.testing.assert_close(hidden[g * K :][:K], expected[len(text) :], rtol=0, atol=4e-5)
        torch.testing.assert_close(hidden[g - 1], expected[len(text) - 1], rtol=0, atol=4e-5)


@torch.no_grad()
def test_a_shifted_mask_has_the_rotary_phase_of_the_position_before_its_own_and_all_else_stays():
    plain, shifted = (adapted_model(link_rank=4, shifted=shifted) for shifted in (False, True))
    text, layout = prompts(9)[0], decode_layout(torch.tensor([0]), 9, (9,), K)
    rows, attention = torch.tensor([[*text, *[0] * K]]), DenseAttention(layout)
    by_hand = torch.tensor([[*range(9), *range(8, 8 + K)]])
    expected = plain.adapted(rows, by_hand, attention, torch.arange(K)[None])
    assert torch.equal(shifted.adapted(rows, layout.position, attention, torch.arange(K)[None]), expected)
    unmoved = plain.adapted(rows, layout.position, attention, torch.arange(K)[None])
    assert torch.equal(unmoved[:, :9], expected[:, :9])
    assert (unmoved[:, 9:] - expected[:, 9:]).abs().max() > 1e-3


PLANNERS = {mode: FixedMode(mode, K) for mode in MODES} | {"any plan": RandomPlanner(1, K)}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
def test_texts_are_the_autoregressive_ones_in_every_mode_beside_requests_without_drafts(adapted, planner, sampling):
    texts = prompts(9, 14, 5, 11, 7)
    decoder = Decoder(adapted, DraftConfig(block_len=K), slots=3, context_len=64, page_len=4)
    mixed = [replace(request, speculative=i != 2) for i, request in enumerate(requests(texts, sampling))]
    done = complete(Scheduler(decoder, planner), mixed)
    assert [tuple(completion.token_ids) for completion in done] == expected_texts(adapted, texts, sampling)
    assert done[2].forwards == 24


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("kind", ["argmax", "sampled"])
def test_captured_steps_give_the_results_of_plain_steps(adapted, kind):
    done = []
    for captured in (True, False):
        decoder = Decoder(adapted, DraftConfig(block_len=K, kind=kind), slots=3, context_len=64, page_len=4)
        if captured:
            decoder._graphs = StepGraphs(decoder._runner, StandInRecorder())
        done.append(complete(Scheduler(decoder), requests(prompts(5, 12, 3, 8), SAMPLED)))
    assert [c.token_ids for c in done[0]] == [c.token_ids for c in done[1]]


@pytest.mark.parametrize("rules", [{}, {"logit_bias": ((500, -1e-9),)}], ids=["no rules", "a rule that bans nothing"])
def test_a_text_may_hold_any_id_and_drafts_depend_on_it_as_on_a_text(adapted, rules):
    every_id = tuple(range(500, 512))
    greedy = replace(GREEDY, max_tokens=8, **rules)
    decoder = Decoder(adapted, DraftConfig(block_len=K), slots=1, context_len=64)
    scheduler = Scheduler(decoder)
    prefilled(scheduler, requests([every_id], greedy)[0])
    drafts = decoder._state.draft[0].tolist()
    with torch.no_grad():
        layout = decode_layout(torch.tensor([0]), 12, (12,), K, causal_masks=adapted.config.causal_masks)
        rows = torch.tensor([[*every_id, *[0] * K]])
        hidden = adapted.adapted(rows, layout.position, DenseAttention(layout), torch.arange(K)[None])
        masks = adapted.head(hidden)[0, 12:]
        chain = [generate_autoregressive(adapted, every_id, greedy)[0]]
        for j in range(1, K):
            before, after = adapted.link.before, adapted.link.after
            if adapted.link.shares_tables:
                vectors = adapted.embedding.weight
                before = vectors / vectors.square().mean(1, keepdim=True).sqrt() @ before
                after = adapted.head.weight @ after
            read = before[chain[-1]]
            if adapted.link.state is not None:
                read = torch.nn.functional.silu(read + adapted.link.state @ hidden[0, 12 + j])
            chain.append(int((masks[j] + after @ read).argmax()))
    assert drafts == chain


def drafts_of(model):
    return {name: value for name, value in model.state_dict().items() if name.startswith(DRAFT_WEIGHTS)}


class Watched:
    """A planner that notes the drafts to be verified next, and exchanges the decoder's weights before some forwards."""

    def __init__(self, decoder, exchanges=None):
        self.decoder, self.exchanges, self.drafts = decoder, exchanges or {}, []

    drafts_first_blocks = True

    def begin_prefill(self):
        pass

    def end_prefill(self):
        pass

    def next_plan(self, pending, context):
        if (weights := self.exchanges.get(len(self.drafts))) is not None:
            self.decoder.load_drafts(weights)
        self.drafts.append(self.decoder._state.draft[: len(self.decoder.running)].tolist())
        return StepPlan(K, tuple(range(1, K + 1)))

    def observe(self, steps, *, beside=False):
        pass


def two_adapters():
    """Models with the same checkpoint and other drafts."""
    old, new = (adapted_model(link_rank=4, seed=7) for _ in range(2))
    generator = torch.Generator().manual_seed(99)
    for value in drafts_of(new).values():
        value.copy_(torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.5)
    return old, new


def decoder_of(model, *, captured=False, looked_up_tokens=512):
    tuning = DecodeTuning(looked_up_tokens=looked_up_tokens)
    decoder = Decoder(model, DraftConfig(block_len=K), slots=3, context_len=64, page_len=4, tuning=tuning)
    if captured:
        decoder._graphs = StepGraphs(decoder._runner, StandInRecorder())
    return decoder


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
def test_drafts_exchanged_in_the_middle_of_texts_change_no_text(captured):
    old, new = two_adapters()
    texts = prompts(5, 12, 3)
    expected = expected_texts(old, texts, SAMPLED)
    addresses = [weight.data_ptr() for weight in old.parameters()]
    decoder, back = decoder_of(old, captured=captured), {n: v.clone() for n, v in drafts_of(old).items()}
    planner = Watched(decoder, {3: drafts_of(new), 7: back, 8: drafts_of(new)})
    done = complete(Scheduler(decoder, planner), requests(texts, SAMPLED))
    assert [tuple(completion.token_ids) for completion in done] == expected
    assert len(planner.drafts) > 8
    assert [weight.data_ptr() for weight in old.parameters()] == addresses


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("looked_up_tokens", [0, 512], ids=["multiplied", "looked up"])
@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
def test_after_an_exchange_drafts_are_those_of_a_decoder_that_began_with_the_new_weights(captured, looked_up_tokens):
    old, new = two_adapters()
    planners = []
    for model, exchange in ((old, False), (old, True), (new, False)):
        decoder = decoder_of(model, captured=captured, looked_up_tokens=looked_up_tokens)
        if exchange:  # after all shapes of steps were captured
            complete(Scheduler(decoder, Watched(decoder)), requests(prompts(5, 9), GREEDY))
            known = captured and decoder._graphs.captured
            decoder.load_drafts(drafts_of(new))
        planners.append(Watched(decoder))
        complete(Scheduler(decoder, planners[-1]), requests(prompts(5, 9), GREEDY))
        assert not (exchange and captured) or decoder._graphs.captured == known
    assert planners[1].drafts == planners[2].drafts
    assert planners[1].drafts != planners[0].drafts


def test_a_scheduler_that_exchanges_drafts_has_its_planner_forget_the_old_ones():
    old, new = two_adapters()
    decoder = decoder_of(old)
    points = tuple(LatencyPoint(rows=r, batch=b, context=9, seconds=1.0) for r in (1, 20) for b in (1, 3))
    planner = AutoPlanner(LatencyTable(points), K, clock=lambda: 0.0)
    scheduler, untried = Scheduler(decoder, planner), planner.facts()["chances"]
    complete(scheduler, requests(prompts(5, 9), GREEDY))
    assert planner.facts()["chances"] != untried
    scheduler.load_drafts(drafts_of(new))
    assert planner.facts()["chances"] == untried
    assert all(torch.equal(value, drafts_of(new)[name]) for name, value in drafts_of(old).items())


@pytest.mark.parametrize("other", [{"rank": 3}, {"link_rank": 5}, {"link_rank": 0}, {"block_len": 5}])
def test_drafts_of_another_shape_are_refused_whole(other):
    model, stranger = (adapted_model(**{"link_rank": 4, **changes}) for changes in ({}, other))
    decoder = Decoder(model, DraftConfig(block_len=K), slots=1, context_len=64)
    before = {name: value.clone() for name, value in drafts_of(model).items()}
    with pytest.raises(WeightsError, match="use the drafts that were trained for this checkpoint"):
        decoder.load_drafts(drafts_of(stranger))
    assert all(torch.equal(value, before[name]) for name, value in drafts_of(model).items())
