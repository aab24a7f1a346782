"""The decoder gives the texts of the autoregressive loop, whatever is drafted, batched or aborted."""

from dataclasses import replace

import pytest
import torch
from decoding import GREEDY, prefilled, prompts, requests
from oracles import documents_row
from tiny import wide_model

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decode_forward import DecodeForward, QueryTokens
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.plan_tensors import QueryPattern
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.errors import CapacityError, ConfigError, RequestError
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.layout import causal_layout, decode_layout, training_layout
from tidar_core.transformer.shapes import named_shape

BLOCK_LENS = [1, 2, 4, 8, 16]
MASK = 511


def scheduler_of(model, *, slots=1, max_waiting=1024, **draft):
    return Scheduler(Decoder(model, DraftConfig(**draft), slots=slots), max_waiting=max_waiting)


def dense(scheduler):
    """Verify all, draft for every outcome."""
    block_len = scheduler.decoder.draft.block_len
    return StepPlan(block_len, tuple(range(1, block_len + 1)))


def decoded(model, texts, sampling, *, rows=3, **draft):
    completions = complete(Scheduler(Decoder(model, DraftConfig(**draft), slots=rows)), requests(texts, sampling))
    return [tuple(c.token_ids) for c in completions]


@pytest.mark.parametrize("kind", ["argmax", "sampled"])
@pytest.mark.parametrize("block_len", BLOCK_LENS)
def test_greedy_tidar_equals_greedy_autoregression_in_ragged_batches(model, block_len, kind):
    texts = prompts(5, 1, 17, 9, 30)
    expected = [generate_autoregressive(model, text, GREEDY) for text in texts]
    assert decoded(model, texts, GREEDY, block_len=block_len, kind=kind) == expected


@pytest.mark.parametrize("sampling", [
    SamplingConfig(max_tokens=16, temperature=1.0, seed=3),
    SamplingConfig(max_tokens=16, temperature=0.7, top_k=20, seed=4),
    SamplingConfig(max_tokens=16, temperature=1.3, top_p=0.8, seed=-5),
])  # fmt: skip
@pytest.mark.parametrize("block_len", BLOCK_LENS)
def test_a_seed_gives_the_autoregressive_text_for_every_block_length_and_batch(model, block_len, sampling):
    texts = prompts(5, 12, 3, 8)
    expected = [generate_autoregressive(model, text, sampling) for text in texts]
    assert decoded(model, texts, sampling, rows=2, block_len=block_len) == expected
    assert decoded(model, texts, sampling, rows=4, block_len=block_len) == expected


def forced(model, block_len, sampling, drafts_after):
    """One request whose drafts are replaced before every step by `drafts_after(tokens so far)`."""
    scheduler = scheduler_of(model, block_len=block_len)
    request = requests(prompts(7), sampling)[0]
    steps = [prefilled(scheduler, request)]
    while scheduler.running:
        tokens = [t for step in steps for t in step.token_ids]
        scheduler.redraft(request.request_id, drafts_after(tokens)[: block_len - 1])
        steps += scheduler.decode_step(dense(scheduler))
    return tuple(t for step in steps for t in step.token_ids), [step.accepted for step in steps[1:]]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(max_tokens=24, temperature=1.0, seed=9)])
@pytest.mark.parametrize("block_len", [2, 4, 8, 16])
def test_true_drafts_are_all_accepted(model, block_len, sampling):
    truth = generate_autoregressive(model, prompts(7)[0], replace(sampling, max_tokens=64))
    text, accepted = forced(model, block_len, sampling, lambda tokens: list(truth[len(tokens) :]))
    assert text == truth[:24]
    assert set(accepted) == {block_len}
    assert len(accepted) == -(-(24 - 1) // block_len)


@pytest.mark.parametrize("block_len", [2, 4, 8, 16])
def test_hostile_drafts_are_all_rejected_and_change_nothing(model, block_len):
    truth = generate_autoregressive(model, prompts(7)[0], replace(GREEDY, max_tokens=64))
    text, accepted = forced(
        model, block_len, GREEDY, lambda tokens: [(t + 1) % 500 for t in truth[len(tokens) : len(tokens) + 15]]
    )
    assert text == truth[:24]
    assert set(accepted) == {1}


@pytest.mark.parametrize("wrong_at", [1, 2, 3])
def test_drafts_stand_up_to_the_first_wrong_one(model, wrong_at):
    truth = generate_autoregressive(model, prompts(7)[0], replace(GREEDY, max_tokens=64))

    def drafts(tokens):
        right = list(truth[len(tokens) : len(tokens) + 15])
        right[wrong_at - 1] = (right[wrong_at - 1] + 1) % 500
        return right

    text, accepted = forced(model, 4, GREEDY, drafts)
    assert text == truth[:24]
    assert set(accepted) == {wrong_at}


def group_hidden(model, prompt, drafts, block_len):
    """Hidden states of one decode forward after a prefill of the prompt: drafts, then each group."""
    cache = KVCache(model.config, pages=8, page_len=4)
    table = torch.tensor([[7, 2, 5, 1, 8]])
    with torch.no_grad():
        for tokens, start, groups in ((prompt, 0, ()), (drafts, len(prompt), tuple(range(1, block_len + 1)))):
            prefix, rows = torch.tensor([start]), torch.tensor([tokens])
            pattern = QueryPattern.of(rows.shape[1], groups, block_len, rows.device)
            read = DecodeForward(model, cache, positions=40, block_len=4)
            (hidden,) = read(QueryTokens(table, prefix, rows, pattern, -(-start // 4)))
    return hidden[0]


@pytest.mark.parametrize("block_len", [1, 2, 4])
def test_group_logits_equal_a_fresh_forward_of_prefix_drafts_and_one_block(model, block_len):
    prompt, drafts = prompts(9)[0], prompts(block_len, seed=1)[0]
    hidden = group_hidden(model, prompt, drafts, block_len)
    for g in range(1, block_len + 1):
        text = (*prompt, *drafts[:g])
        fresh = decode_layout(torch.tensor([0]), len(text), (len(text),), block_len)
        rows = torch.tensor([[*text, *[MASK] * block_len]])
        with torch.no_grad():
            expected = model(rows, fresh.position, DenseAttention(fresh))[0]
        group = hidden[block_len + (g - 1) * block_len :][:block_len]
        # fp32, keys summed in another order
        torch.testing.assert_close(group, expected[len(text) :], rtol=0, atol=1e-5)
        torch.testing.assert_close(hidden[g - 1], expected[len(text) - 1], rtol=0, atol=1e-5)


def test_group_logits_equal_those_of_the_training_block_at_the_same_place(model):
    block_len, prompt, drafts = 4, prompts(7)[0], prompts(4, seed=1)[0]
    hidden = group_hidden(model, prompt, drafts, block_len)
    text = (*prompt, *drafts, 1)  # the block that starts at 8 is the group for one accepted draft
    layout = training_layout(documents_row(len(text)), block_len)
    with torch.no_grad():
        trained = model(torch.tensor([[*text, *[MASK] * len(text)]]), layout.position, DenseAttention(layout))
    torch.testing.assert_close(hidden[block_len : 2 * block_len], trained[0, 12 + 8 : 12 + 12], rtol=0, atol=1e-5)


def test_draft_rows_do_not_feel_the_mask_rows(model):
    prompt, drafts = prompts(9)[0], prompts(4, seed=1)[0]
    with_groups = group_hidden(model, prompt, drafts, 4)
    layout = causal_layout(documents_row(13))
    with torch.no_grad():
        alone = model(torch.tensor([[*prompt, *drafts]]), layout.position, DenseAttention(layout))[0, 9:]
    torch.testing.assert_close(with_groups[:4], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_len", [1, 4, 8])
def test_keys_and_values_after_commits_are_those_of_a_clean_prefill(model, block_len):
    scheduler = scheduler_of(model, slots=2, block_len=block_len)
    request = requests(prompts(7), GREEDY)[0]
    tokens = [*request.prompt, *prefilled(scheduler, request).token_ids]
    for _ in range(9):
        tokens += scheduler.decode_step(dense(scheduler))[0].token_ids
    known = len(tokens) - 1  # the last token's key is computed by the next step
    found = scheduler.decoder.cache.clean(scheduler.decoder.running[0].pages.ids, known)
    clean = scheduler_of(model, block_len=1)
    prefilled(clean, replace(request, prompt=tuple(tokens[:known])))
    for ours, expected in zip(found, clean.decoder.cache.clean(clean.decoder.running[0].pages.ids, known)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_texts_do_not_depend_on_who_else_is_in_the_batch_or_when_they_came(model):
    texts = prompts(5, 12, 3, 8, 20, 2)
    sampling = SamplingConfig(max_tokens=20, temperature=0.9, seed=11)
    alone = [decoded(model, [text], sampling, rows=1, block_len=4)[0] for text in texts]
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=4), slots=3))
    out = {str(i): [] for i in range(len(texts))}
    pending = requests(texts, sampling)
    turn = 0
    while pending or scheduler.busy:
        if pending and turn % 3 != 1:
            scheduler.submit(pending.pop())
        for step in scheduler.advance():
            out[step.request_id] += step.token_ids
        turn += 1
    assert [tuple(tokens) for tokens in out.values()] == alone


def test_an_aborted_request_frees_its_slot_at_once_and_disturbs_nobody(model):
    texts = prompts(5, 12, 3, 8)
    expected = [generate_autoregressive(model, text, GREEDY) for text in texts]
    scheduler = scheduler_of(model, slots=3, max_waiting=0, block_len=4)
    out = {str(i): [] for i in range(4)}
    queue = requests(texts, GREEDY)
    for request in queue[:3]:
        out[request.request_id] += prefilled(scheduler, request).token_ids
    with pytest.raises(CapacityError, match="all 3 slots"):
        prefilled(scheduler, queue[3])
    for step in scheduler.decode_step(dense(scheduler)):
        out[step.request_id] += step.token_ids
    assert scheduler.abort("0")
    assert not scheduler.abort("0")
    out["3"] += prefilled(scheduler, queue[3]).token_ids
    while scheduler.running:
        for step in scheduler.decode_step(dense(scheduler)):
            out[step.request_id] += step.token_ids
    assert [tuple(out[i]) for i in "123"] == expected[1:]


@pytest.mark.parametrize("block_len", [1, 4, 8])
def test_generation_stops_with_the_first_end_of_text_even_inside_a_block(model, block_len):
    text = prompts(7)[0]
    whole = generate_autoregressive(model, text, GREEDY)
    eos = whole[10]
    stopping = replace(GREEDY, eos_ids=(eos,))
    end = whole.index(eos) + 1
    decoder = Decoder(model, DraftConfig(block_len=block_len), slots=1)
    completion = complete(Scheduler(decoder), requests([text], stopping))[0]
    assert tuple(completion.token_ids) == whole[:end] == generate_autoregressive(model, text, stopping)
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 24])
def test_max_tokens_is_never_overshot_even_when_a_whole_block_stands(model, max_tokens):
    truth = generate_autoregressive(model, prompts(7)[0], replace(GREEDY, max_tokens=64))
    sampling = replace(GREEDY, max_tokens=max_tokens)
    text, _ = forced(model, 4, sampling, lambda tokens: list(truth[len(tokens) :]))
    assert text == truth[:max_tokens]


def test_a_prompt_longer_than_one_prefill_chunk_reads_the_same(model):
    text = prompts(50)[0]
    expected = generate_autoregressive(model, text, GREEDY)
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=4), slots=3), prefill_tokens=16)
    (completion,) = complete(scheduler, requests([text], GREEDY))
    assert tuple(completion.token_ids) == expected


def test_the_whole_context_can_be_used(model):
    text = prompts(100)[0]
    sampling = SamplingConfig(max_tokens=28)
    assert decoded(model, [text], sampling, block_len=16) == [generate_autoregressive(model, text, sampling)]


@pytest.mark.parametrize("block_len", [1, 2, 4, 8])
def test_beta_zero_trusts_the_first_mask_of_the_block_at_each_position(model, block_len):
    """Below 1, beta defines another model: its next token comes from a fresh block after the prefix alone."""
    text = prompts(7)[0]
    for beta in (0.0, 0.4):
        tokens = list(text)
        for _ in range(12):
            layout = decode_layout(torch.tensor([0]), len(tokens), (len(tokens),), block_len)
            rows = torch.tensor([[*tokens, *[MASK] * block_len]])
            with torch.no_grad():
                z = model.head(model(rows, layout.position, DenseAttention(layout)))[0]
            mixed = beta * z[len(tokens) - 1] + (1 - beta) * z[len(tokens)]
            mixed[MASK] = -torch.inf
            tokens.append(int(mixed.argmax()))
        sampling = SamplingConfig(max_tokens=12, beta=beta)
        assert decoded(model, [text], sampling, block_len=block_len) == [tuple(tokens[7:])]


def test_tokens_per_forward_lies_between_one_and_the_block_length(model):
    completion = complete(Scheduler(Decoder(model, DraftConfig(block_len=4), slots=1)), requests(prompts(7), GREEDY))[0]
    assert 1 <= completion.tokens_per_forward <= 4
    assert completion.accepted.total() == completion.forwards - 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ((), 4, "no tokens"),
        ((1,) * 120, 9, "context of 128"),
        ((1, 2, MASK), 4, "mask token"),
        ((1, -1), 4, "ids are 0"),
        ((1, 512), 4, "ids are 0"),
    ],
)
def test_a_request_that_can_never_run_is_refused_in_one_line(model, prompt, max_tokens, words):
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=4), slots=1))
    request = Request(request_id="r", prompt=prompt, sampling=SamplingConfig(max_tokens=max_tokens))
    with pytest.raises(RequestError, match=words) as caught:
        scheduler.submit(request)
    assert "\n" not in str(caught.value)
    assert not scheduler.busy


def test_a_model_without_a_mask_token_can_only_decode_one_by_one():
    plain = wide_model(replace(named_shape("tiny"), mask_id=None))
    with pytest.raises(ConfigError, match="no mask token"):
        Decoder(plain, DraftConfig(block_len=4), slots=1)
    assert decoded(plain, prompts(5), GREEDY, block_len=1) == [generate_autoregressive(plain, prompts(5)[0], GREEDY)]


def test_a_full_queue_and_a_double_id_are_refused(model):
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=2), slots=1), max_waiting=0)
    first, second = requests(prompts(3, 4), GREEDY)
    scheduler.submit(first)
    with pytest.raises(RequestError, match="in use already"):
        scheduler.submit(first)
    with pytest.raises(CapacityError, match="try again later"):
        scheduler.submit(second)
    assert scheduler.abort("0")
    assert not scheduler.busy


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_other_families_decode_the_same(name):
    config = replace(named_shape("tiny"), architecture=name, qk_norm=False, qkv_bias=name == "qwen2", tied_head=False)
    other = wide_model(config, seed=1)
    texts = prompts(5, 9)
    expected = [generate_autoregressive(other, text, GREEDY) for text in texts]
    assert decoded(other, texts, GREEDY, block_len=4) == expected


def test_bfloat16_texts_may_part_only_where_two_tokens_are_nearly_tied(model):
    half = wide_model(named_shape("tiny")).bfloat16()
    for text in prompts(5, 9, 14):
        expected = generate_autoregressive(half, text, GREEDY)
        found = decoded(half, [text], GREEDY, block_len=4)[0]
        parted = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), None)
        if parted is None:
            continue
        tokens = torch.tensor([[*text, *expected[:parted]]])
        layout = causal_layout(torch.zeros_like(tokens))
        with torch.no_grad():
            logits = half.head(half(tokens, layout.position, DenseAttention(layout)))[0, -1].float()
        gap = (logits[expected[parted]] - logits[found[parted]]).abs()
        # bf16 keeps 8 bits; a few roundings through two layers add up to some times 2**-8 of the largest logit
        assert gap <= 2**-5 * logits[logits.isfinite()].abs().max()
