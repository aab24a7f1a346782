"""Drafts that are linked follow from each other, train on the tokens before their labels, and change no text."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from decoding import GREEDY, RandomPlanner, expected_texts, prefilled, prompts, requests
from oracles import documents_row
from tiny import adapted_model, wide_model

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decode_step import DecodeTuning
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.held_link import HeldLink
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.errors import ConfigError
from tidar_core.kernels import PLAIN, c_kernels
from tidar_core.kernels.compiled import library
from tidar_core.training.dual_mode import IGNORED, dual_mode_batch
from tidar_core.training.losses import chunk_loss, dual_mode_loss, label_counts, loss_sums
from tidar_core.training.objective import Objective
from tidar_core.training.recipe import Recipe, start_draft_link
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import decode_layout
from tidar_core.transformer.shapes import named_shape

MASK = 511
DENSE = StepPlan(5, (1, 2, 3, 4, 5))
compiled = pytest.mark.skipif(library() is None, reason="no C compiler works here")
SAMPLED = SamplingConfig(max_tokens=24, temperature=1.0, seed=5)


def linked_model(rank=6, loud=3.0):
    model = wide_model(named_shape("tiny"))
    start_draft_link(model, rank, seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        model.link.after.copy_(loud * torch.randn(512, rank))
    return model


@pytest.fixture(scope="module")
def linked():
    return linked_model()


def chain(model, text, first, count):
    """Likeliest drafts d_2.. behind `text` and `first`, from a fresh forward of one block of masks."""
    K = count + 1
    layout = decode_layout(torch.tensor([0]), len(text), (len(text),), K)
    with torch.no_grad():
        rows = torch.tensor([[*text, *[MASK] * K]])
        masks = model.head(model(rows, layout.position, DenseAttention(layout)))[0, len(text) :]
        table = model.link.before @ model.link.after.T
    emitted = [first]
    for j in range(1, K):
        emitted.append(int((masks[j] + table[emitted[-1]]).argmax()))
    return emitted


@pytest.mark.parametrize("looked_up_tokens", [0, 512], ids=["multiplied", "looked up"])
@pytest.mark.parametrize("rules", [{}, {"logit_bias": ((500, -1e-9),)}], ids=["no rules", "a rule that bans nothing"])
def test_each_draft_follows_from_the_one_before_it(linked, rules, looked_up_tokens):
    tuning = DecodeTuning(looked_up_tokens=looked_up_tokens)
    scheduler = Scheduler(Decoder(linked, DraftConfig(block_len=5), slots=1, tuning=tuning))
    text = prompts(9)[0]
    step = prefilled(scheduler, requests([text], replace(GREEDY, **rules))[0])
    emitted, unlinked, silent = list(text), 0, linked_model(loud=0.0)
    for _ in range(8):
        emitted += step.token_ids
        drafts = chain(linked, emitted[:-1], emitted[-1], 4)
        assert scheduler.decoder._state.draft[0].tolist() == drafts
        unlinked += drafts != chain(silent, emitted[:-1], emitted[-1], 4)
        (step,) = scheduler.decode_step(DENSE)
    assert unlinked > 4  # the link has an effect


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [("argmax", GREEDY), ("sampled", GREEDY), ("argmax", SAMPLED)],
    ids=lambda value: str(value)[:7],
)
@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_link_adds_texts_are_the_autoregressive_ones(linked, seed, kind, sampling):
    texts = prompts(5, 12, 3, 8, 17, seed=seed)
    decoder = Decoder(linked, DraftConfig(block_len=4, kind=kind), slots=3)
    done = complete(Scheduler(decoder, RandomPlanner(seed, 4)), requests(texts, sampling))
    assert [list(c.token_ids) for c in done] == [list(t) for t in expected_texts(linked, texts, sampling)]


def test_a_link_computes_in_the_models_dtype(linked):
    """Trust in diffusion reads linked logits too."""
    half = copy.deepcopy(linked).bfloat16()
    for beta in (0.3, 1.0):
        sampling = replace(SAMPLED, beta=beta, max_tokens=6)
        (done,) = complete(Scheduler(Decoder(half, DraftConfig(block_len=4), slots=1)), requests(prompts(7), sampling))
        assert len(done.token_ids) == 6


def test_a_request_without_drafts_may_trust_diffusion_beside_others(linked):
    """The link reads the token before each position; where no draft was made, there is none."""
    sampling = replace(GREEDY, beta=0.3, max_tokens=12)
    both = [replace(r, speculative=r.request_id != "0") for r in requests(prompts(5, 9), sampling)]

    def texts(of):
        done = complete(Scheduler(Decoder(linked, DraftConfig(block_len=4), slots=2), RandomPlanner(0, 4)), of)
        return [done_one.token_ids for done_one in done]

    assert texts(both) == [*texts(both[:1]), *texts(both[1:])]


@pytest.mark.parametrize("in_c", [False, pytest.param(True, marks=compiled)], ids=["in torch", "in C"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("reads_state", "looked_up_tokens"), [(False, 0), (True, 0), (False, 512)], ids=["map", "state", "table"]
)
def test_drafts_of_several_sequences_each_follow_from_their_own_token_before(
    in_c, dtype, reads_state, looked_up_tokens
):
    """The logits are corrected in place."""
    kernels = c_kernels() if in_c else PLAIN
    model = adapted_model(link_rank=4, link_reads_state=reads_state).to(dtype)
    generator = torch.Generator().manual_seed(3)
    logits_BKV, hidden_BKE = (torch.randn(3, 5, n, generator=generator).to(dtype) for n in (512, 32))
    first_B1, link = torch.tensor([[7], [0], [511]]), model.link
    corrected_BKV, close = logits_BKV.clone(), 1e-5 if dtype == torch.float32 else 2**-6
    with torch.no_grad():
        drafts_BK = HeldLink(model, kernels, looked_up_tokens).likeliest(corrected_BKV, first_B1, hidden_BKE)
    for b in range(3):
        before = int(first_B1[b])
        for k in range(5):
            read = link.before[before].float()
            if reads_state:
                read = F.silu(read + link.state.float() @ hidden_BKE[b, k].float())
            expected = logits_BKV[b, k].float() + link.after.float() @ read
            torch.testing.assert_close(corrected_BKV[b, k].float(), expected, rtol=close, atol=close)
            before = int(drafts_BK[b, k])
            assert expected[before] >= expected.max() - 2 * close


def test_a_link_that_was_just_started_adds_nothing():
    """So conversion begins with the paper's model."""
    model = wide_model(named_shape("tiny"))
    ids, documents = torch.randint(0, 500, (1, 24)), documents_row(24)
    objective = Objective(model, dual=True, block_len=4)
    before = objective(objective.batch(ids, documents))
    start_draft_link(model, 8, seed=0)
    assert model.config.link_rank == 8
    after = objective(objective.batch(ids, documents))
    assert before.diffusion_sum == after.diffusion_sum
    assert before.ar_sum == after.ar_sum


def test_the_diffusion_loss_knows_the_token_before_each_label_and_the_ar_loss_does_not(linked):
    ids = torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(3))
    documents = torch.cat([documents_row(13, 7), documents_row(15, padding=5)])
    batch = dual_mode_batch(ids, documents, 4, MASK)
    with torch.no_grad():
        hidden = linked(batch.token_BL, batch.layout.position, DenseAttention(batch.layout))
        every = linked.head(hidden)
        table = linked.link.before @ linked.link.after.T
    sums = loss_sums(hidden, linked.head, batch, 4, link=linked.link_logits)
    ar = diffusion = 0.0
    for b in range(2):
        for s in range(20):
            if (target := batch.ar_target_BS[b, s]) != IGNORED:
                ar -= F.log_softmax(every[b, s], -1)[target]
            if (target := batch.diffusion_target_BM[b, s]) != IGNORED:
                diffusion -= F.log_softmax(every[b, 20 + s] + table[ids[b, s - 1]], -1)[target]
    assert sums.ar_sum.item() == pytest.approx(float(ar), rel=1e-5)
    assert sums.diffusion_sum.item() == pytest.approx(float(diffusion), rel=1e-5)


def test_drawn_blocks_keep_the_tokens_before_their_masks(linked):
    ids = torch.arange(48).repeat(2, 1)
    batch = dual_mode_batch(ids, documents_row(48).repeat(2, 1), 4, MASK, recipe=Recipe(block_share=0.5), seed_B=[1, 2])
    labelled = batch.diffusion_target_BM != IGNORED
    assert labelled.any()
    assert torch.equal(batch.before_BM[labelled], batch.diffusion_target_BM[labelled] - 1)


def test_chunks_of_logits_change_neither_a_linked_loss_nor_its_gradient(linked):
    ids = torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(4))
    batch = Objective(linked, dual=True, block_len=4).batch(ids, documents_row(20).repeat(2, 1))
    results = []
    for at_once in (None, 512 * 7):
        objective = Objective(linked, dual=True, block_len=4, logits_at_once=at_once)
        linked.zero_grad()
        sums = objective(batch)
        dual_mode_loss(sums, 1.0, *label_counts(batch)).backward()
        results.append((sums.diffusion_sum.item(), linked.link.before.grad.clone()))
    linked.zero_grad()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 16])
def test_what_hangs_on_a_neighbour_in_the_block_is_learned_with_a_link_alone(rank):
    """Pairs (a, a + 8) with any a: no mask can know the second half of a pair whose first is hidden as well."""
    torch.manual_seed(0)
    model = wide_model(named_shape("tiny"))
    model.init_weights(0)
    if rank:
        start_draft_link(model, rank, seed=0)
    objective = Objective(model.train(), dual=True, block_len=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        first = torch.randint(0, 8, (8, 16))
        ids = torch.stack([first, first + 8], 2).flatten(1)
        batch = objective.batch(ids, torch.zeros_like(ids))
        optimizer.zero_grad()
        sums = objective(batch)
        dual_mode_loss(sums, 1.0, *label_counts(batch)).backward()
        optimizer.step()
    right = (sums.draft_hits_K / sums.draft_count_K)[1]
    assert right > 0.95 if rank else right < 0.35  # one in eight, by luck


def test_a_link_of_another_rank_is_refused():
    model = linked_model(rank=4)
    start_draft_link(model, 4, seed=9)  # the one that is there
    assert model.link.after.std() > 1
    with pytest.raises(ConfigError, match="link_rank is 8; the weights have a link of rank 4; leave link_rank out"):
        start_draft_link(model, 8, seed=0)
    with pytest.raises(ConfigError, match="link_rank is 0; it must be 1 or more, or left out"):
        Recipe(link_rank=0)


def test_a_link_may_read_the_masks_hidden_state_and_learns_to():
    adapted = adapted_model(link_rank=4, link_reads_state=True)
    hidden = torch.randn(5, adapted.config.hidden_size, generator=torch.Generator().manual_seed(2))
    before, target = torch.arange(5), torch.arange(5, 10)
    loss, *_ = chunk_loss(adapted.head, hidden, target, None, before, None, 0.0, adapted.link_logits)
    for n in range(5):
        read = adapted.link.before[n] + adapted.link.state @ hidden[n]
        logits = adapted.head.weight @ hidden[n] + adapted.link.after @ (read * read.sigmoid())
        assert loss[n].item() == pytest.approx(-logits.log_softmax(-1)[n + 5].item(), rel=1e-4)
    loss.sum().backward()
    assert adapted.link.state.grad.abs().max() > 0
    assert adapted.link.table(adapted.embedding, adapted.head) is None
    adapted.link.start(torch.Generator().manual_seed(0))
    assert adapted.link_logits(before, hidden).abs().max() == 0


@pytest.mark.parametrize("reads_state", [False, True])
def test_a_link_through_the_checkpoints_tables_learns_maps_of_them_alone(reads_state):
    shape = replace(named_shape("tiny"), tied_head=False)
    adapted = adapted_model(shape, link_rank=4, link_shares_tables=True, link_reads_state=reads_state)
    link, table, head = adapted.link, adapted.embedding.weight, adapted.head.weight
    assert link.before.shape == link.after.shape == (adapted.config.hidden_size, 4)
    hidden = torch.randn(5, adapted.config.hidden_size, generator=torch.Generator().manual_seed(2))
    before = torch.tensor([3, 1, 500, 3, 9])
    added = adapted.link_logits(before, hidden)
    for n in range(5):
        vector = table[before[n]]
        read = link.before.T @ (vector / vector.square().mean().sqrt())
        if reads_state:
            read = F.silu(read + link.state @ hidden[n])
        torch.testing.assert_close(added[n], head @ (link.after @ read), rtol=1e-4, atol=1e-5)
    added.sum().backward()
    assert link.before.grad.abs().max() > 0
    assert link.after.grad.abs().max() > 0
    link.start(torch.Generator().manual_seed(0))
    assert adapted.link_logits(before, hidden).abs().max() == 0
    assert link.before.std().item() == pytest.approx(adapted.config.hidden_size**-0.5, rel=0.1)
