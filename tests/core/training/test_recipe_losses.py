"""Losses of the recipe's choices, against loops over labels; chunks, cuts and workers change no sum."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import documents_row
from tiny import wide_model
from torch._dynamo.testing import CompileCounter

from tidar_core.training.distillation import blended
from tidar_core.training.dpace import dpace_weights
from tidar_core.training.dual_mode import IGNORED, dual_mode_batch
from tidar_core.training.losses import chunk_loss, dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.packing import PackedRows
from tidar_core.training.recipe import Recipe
from tidar_core.training.schedule import Schedule
from tidar_core.training.trainer import Phase, Trainer
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import LENGTH_STEP
from tidar_core.transformer.shapes import named_shape

MASK, K = 511, 4
IDS = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(0))
LENGTHS = ((13, 9), (24,))
DOCUMENTS = torch.cat([documents_row(13, 9, padding=2), documents_row(24)])
TRAINED = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.6
EVERY = Recipe(
    position_weights="dpace", dpace_after=0.3, first_weight=0.2, distillation=0.4, unlinked=0.3, consistency=0.7
)
CHOICES = {
    "the paper's": Recipe(),
    "exponential": Recipe(position_weights="exponential", first_weight=0.1),
    "dpace": Recipe(position_weights="dpace", dpace_after=0.0),
    "unlinked": Recipe(unlinked=0.3),
    "consistency": Recipe(consistency=0.5),
    "every choice": EVERY,
    "every choice, drawn": replace(EVERY, random_phase=True, block_share=0.7, block_lens=(2, 4), masking="random"),
}


@pytest.fixture(scope="module")
def linked():
    return wide_model(replace(named_shape("tiny"), link_rank=4)).train()


def objective_of(model, recipe, **choices):
    return Objective(model, dual=True, block_len=K, recipe=recipe, **choices)


def loss_of(model, recipe, share, *, trained=None, rows=slice(None), **choices):
    """Diffusion sum and count, loss, and gradients."""
    objective = objective_of(model, recipe, **choices)
    seeds = [3, 4][rows]
    batch = objective.batch(
        IDS[rows], DOCUMENTS[rows], None if trained is None else trained[rows], seed_B=seeds, share=share
    )
    model.zero_grad()
    sums = objective(batch)
    loss = dual_mode_loss(sums, 1.0, *label_counts(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return sums, loss.item(), gradients


def test_dpace_weights_of_one_block_typed_out():
    loss = -torch.tensor([[0.3, 0.5, 1e-30, 1.0]]).log()  # smoothed chances at offsets 1..3: 0.75, 0.5, 1
    weights = dpace_weights(loss, torch.ones(1, 4, dtype=torch.bool), torch.arange(4)[None], 4)
    # the third is reached with 0.75 * 0.5 and passes: 0.375; the second adds 0.375, the first 0.75
    torch.testing.assert_close(weights, torch.tensor([[1, 0.75 + 0.375 + 0.375, 0.375 + 0.375, 0.375]]))


def continuation(chances):
    """Weights of offsets 1.. from the back: the chance to arrive, times what is expected from there on."""
    weights, value = [], 0.0
    for j in reversed(range(len(chances))):
        value = chances[j] * (1 + value)
        weights.insert(0, math.prod(chances[:j]) * value)
    return weights


@pytest.mark.parametrize("seed", [0, 1])
def test_dpace_weights_equal_a_recursion_from_the_end_of_each_block(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = (3, 1, 5, 5, 2)  # the first and the last are cut by a phase and by the end of the row
    offset = torch.cat([torch.arange(n) for n in lengths])[None]
    loss = torch.rand(1, 16, generator=generator) * 4
    labelled = torch.rand(1, 16, generator=generator) < 0.7
    found, begin = dpace_weights(loss, labelled, offset, 5)[0], 0
    for length in lengths:
        chain = [s for s in range(begin + 1, begin + length) if labelled[0, s]]
        expected = continuation([0.5 + 0.5 * math.exp(-loss[0, s]) for s in chain])
        assert found[begin] == 1
        torch.testing.assert_close(found[chain], torch.tensor(expected))
        begin += length


def test_dpace_weights_are_the_derivatives_of_the_expected_number_of_accepted_drafts():
    loss = torch.tensor([[0.0, 0.2, 1.5, 0.7, 3.0]])
    log_chance = (0.5 + 0.5 * torch.exp(-loss[0, 1:])).log().requires_grad_()
    sum(log_chance[: m + 1].sum().exp() for m in range(4)).backward()
    weights = dpace_weights(loss, torch.ones(1, 5, dtype=torch.bool), torch.arange(5)[None], 5)
    torch.testing.assert_close(weights[0, 1:], log_chance.grad)


def looped(model, recipe, share):
    """Diffusion sum and sum of weights, one label after another, all blocks whole; weights carry no gradient."""
    batch = dual_mode_batch(IDS, DOCUMENTS, K, MASK)
    hidden = model(batch.token_BL, batch.layout.position, DenseAttention(batch.layout))
    link = model.link.before @ model.link.after.T
    after = recipe.position_weights == "dpace" and share >= recipe.dpace_after
    exponential = recipe.position_weights == "exponential" or (recipe.position_weights == "dpace" and not after)
    b = 1 - 0.7 * min(1.0, 3 * share) if recipe.unlinked else 0.0
    total = weights = torch.zeros((), dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            for first in range(begin + K, begin + length, K):
                losses, chances = [], []
                for s in range(first, min(first + K, begin + length)):
                    own = model.head(hidden[row, 24 + s])[:MASK].double()
                    p = model.head(hidden[row, s - 1])[:MASK].double().softmax(-1).detach()
                    label = torch.nn.functional.one_hot(IDS[row, s], MASK).double()
                    aim = (1 - recipe.distillation) * label + recipe.distillation * p
                    with_link = (own + link[IDS[row, s - 1], :MASK].double()).log_softmax(-1)
                    loss = -(aim * (with_link + b * own.log_softmax(-1))).sum() / (1 + b)
                    apart = hidden[row, 24 + s] - hidden[row, s - 1].detach()
                    losses.append(loss + recipe.consistency * apart.square().mean())
                    chances.append(0.5 + 0.5 * with_link[IDS[row, s]].exp().item())
                weight = [math.exp(-j / 2.5) if exponential else 1.0 for j in range(len(losses))]
                if after:
                    weight[1:] = continuation(chances[1:])
                weight[0] *= recipe.first_weight
                total = total + sum(w * loss for w, loss in zip(weight, losses))
                weights = weights + sum(weight)
            begin += length
    return total, weights


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("name", [name for name in CHOICES if "drawn" not in name])
def test_the_diffusion_loss_and_its_gradient_equal_a_loop_over_labels(linked, name, share):
    sums, _, _ = loss_of(linked, CHOICES[name], share)
    total, weights = looped(linked, CHOICES[name], share)
    assert sums.diffusion_sum.item() == pytest.approx(total.item(), rel=1e-5)
    assert sums.diffusion_count.item() == pytest.approx(weights.item(), rel=1e-5)
    total.backward()
    expected = {name: p.grad.clone() for name, p in linked.named_parameters()}
    linked.zero_grad()
    objective = objective_of(linked, CHOICES[name])
    objective(objective.batch(IDS, DOCUMENTS, share=share)).diffusion_sum.backward()
    for weight, p in linked.named_parameters():
        torch.testing.assert_close(p.grad, expected[weight], rtol=1e-3, atol=1e-4, msg=weight)  # fp32 against fp64
    linked.zero_grad()


def test_the_divisor_of_a_dpace_loss_is_known_before_the_forward(linked):
    """So gradients of several workers and forwards add up, and the size of the weights counts."""
    batch = objective_of(linked, EVERY).batch(IDS, DOCUMENTS, share=0.6)
    offsets = [place % K for lengths in LENGTHS for n in lengths for place in range(K, n)]
    expected = sum(0.2 if offset == 0 else 1.0 for offset in offsets)
    assert label_counts(batch)[1].item() == pytest.approx(expected)


@pytest.mark.parametrize("trained", [None, TRAINED], ids=["all", "answers"])
@pytest.mark.parametrize("name", CHOICES)
def test_neither_chunks_of_logits_nor_cuts_to_labels_change_loss_or_gradient(linked, name, trained):
    whole = loss_of(linked, CHOICES[name], 0.6, trained=trained)
    for choices in ({"logits_at_once": 512 * 7}, {"ragged": True}, {"ragged": True, "logits_at_once": 512 * 7}):
        sums, loss, gradients = loss_of(linked, CHOICES[name], 0.6, trained=trained, **choices)
        assert loss == pytest.approx(whole[1], rel=1e-6)
        assert torch.equal(sums.draft_hits_K, whole[0].draft_hits_K)
        assert torch.equal(sums.draft_count_K, whole[0].draft_count_K)
        for weight, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[2][weight], rtol=1e-4, atol=1e-6, msg=weight)


def test_shares_of_two_forwards_add_up_to_the_loss_of_one(linked):
    objective = objective_of(linked, EVERY)
    batches = [objective.batch(IDS[r], DOCUMENTS[r], share=0.6) for r in (slice(0, 2), slice(0, 1), slice(1, 2))]
    with torch.no_grad():
        whole, *parts = (dual_mode_loss(objective(batch), 1.0, *label_counts(batches[0])) for batch in batches)
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_a_cut_half_holds_the_blocks_with_labels_and_no_others():
    trained = torch.zeros_like(TRAINED)
    trained[0, [6, 18]] = trained[1, 21] = True
    made = dual_mode_batch(IDS, DOCUMENTS, K, MASK, trained, ragged=True)
    i = IGNORED
    # 8 masks in the longer row, rounded up, but to no more than the 24 tokens of the row
    assert made.diffusion_target_BM.tolist() == [
        [i, i, IDS[0, 6], i, i, IDS[0, 18], i, i, *[i] * 16], [i, IDS[1, 21], i, i, i, i, i, i, *[i] * 16]
    ]  # fmt: skip
    assert made.layout.position[:, 24:].tolist() == [[4, 5, 6, 7, 4, 5, 6, 7, *[0] * 16], [20, 21, 22, 23, *[0] * 20]]
    assert made.layout.document[:, 24:].tolist() == [[0] * 4 + [1] * 4 + [-1] * 16, [0] * 4 + [-1] * 20]
    assert made.before_BM[0, 2] == IDS[0, 5]
    none = dual_mode_batch(IDS, DOCUMENTS, K, MASK, torch.zeros_like(trained), ragged=True)
    assert (none.diffusion_target_BM == i).all()


@pytest.mark.parametrize("visits", [1, 3])
def test_lengths_of_cut_halves_recur_and_are_shared_by_workers(visits):
    """Few lengths, since each new length costs a CPU as much as many products; masks of all visits lie together."""
    recipe, S = Recipe(random_phase=True, visits=visits), 256
    lengths, fewest = set(), []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        trained = torch.rand(1, S, generator=generator) < 0.03 * (1 + seed % 4)
        ids, documents = torch.randint(0, 500, (1, S), generator=generator), documents_row(100, 150, padding=6)
        made = dual_mode_batch(ids, documents, K, MASK, trained, recipe=recipe, seed_B=[seed], ragged=True, multiple=3)
        layout = made.layout[:, S:]
        masks = (layout.document[0] >= 0).tolist()
        assert masks == sorted(masks, reverse=True)
        lengths.add(len(masks))
        fewest.append(sum(masks))
        facts = zip(layout.document[0], layout.block[0], layout.position[0], made.diffusion_target_BM[0])
        labels = {tuple(map(int, fact[:3])) for fact in facts if fact[3] != IGNORED}
        assert len(labels) == int((made.diffusion_target_BM != IGNORED).sum())
    assert all(length % math.lcm(3, LENGTH_STEP) == 0 or length == visits * S for length in lengths)
    assert len(set(fewest)) > 2 * len(lengths)


def test_logits_are_computed_only_where_labels_are(linked):
    rows = []
    hook = linked.head.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[0]))
    objective = objective_of(linked, Recipe(), ragged=True)
    batch = objective.batch(IDS, DOCUMENTS, TRAINED)
    objective(batch)
    hook.remove()
    counts = [int(count) for count in label_counts(batch)]
    rounded = [-(-count // LENGTH_STEP) * LENGTH_STEP for count in counts]
    assert [n for n in rows if n > 1] == rounded  # one token each measures the vocabulary
    assert sum(counts) < 0.5 * batch.token_BL.numel()


def test_a_batch_without_labels_has_no_loss(linked):
    objective = objective_of(linked, replace(EVERY, dpace_after=0.0), ragged=True)
    sums = objective(objective.batch(IDS, DOCUMENTS, torch.zeros_like(TRAINED)))
    assert (sums.ar_sum.item(), sums.diffusion_sum.item(), sums.diffusion_count.item()) == (0, 0, 0)


def test_weights_and_annealing_follow_the_share_of_the_run():
    recipe = Recipe(position_weights="dpace", dpace_after=0.2, unlinked=0.3)
    assert [recipe.weights_at(share) for share in (0.0, 0.19, 0.2, 1.0)] == ["exponential"] * 2 + ["dpace"] * 2
    assert [recipe.unlinked_at(s) for s in (0, 1 / 6, 1 / 3, 1)] == pytest.approx([1, 0.65, 0.3, 0.3])
    assert Recipe(position_decay=4.0).weights_at(0.5) == "exponential"
    assert Recipe().weights_at(0.5) == Recipe(position_weights="flat").weights_at(0.0) == "flat"


@pytest.mark.parametrize(("block_len", "decay"), [(8, 4), (16, 7)])
def test_the_usual_decay_is_that_of_the_block_length(block_len, decay):
    ids = torch.arange(64)[None]
    recipe = Recipe(position_weights="exponential")
    found = dual_mode_batch(ids, documents_row(64), block_len, MASK, recipe=recipe).diffusion_weight_BM[0, :block_len]
    torch.testing.assert_close(found, torch.exp(-torch.arange(block_len) / decay))


def test_the_trainer_passes_the_share_of_the_run(model, monkeypatch):
    shares, batch = [], Objective.batch
    monkeypatch.setattr(
        Objective,
        "batch",
        lambda self, *given, share=0.0, **named: shares.append(share) or batch(self, *given, **named),
    )
    phase = Phase(
        dual=True, schedule=Schedule(peak=1e-3, minimum=1e-3, warmup=0.0), rows_per_step=2, rows_per_forward=1,
        steps=4, recipe=EVERY,
    )  # fmt: skip
    Trainer(wide_model(named_shape("tiny")), block_len=K).train(phase, PackedRows(IDS, DOCUMENTS), lambda _: None)
    assert shares == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_a_compiled_loss_is_compiled_once_while_the_annealing_moves(linked):
    counter = CompileCounter()
    compiled = torch.compile(chunk_loss, backend=counter, dynamic=False)
    hidden, target, before = torch.randn(6, 32), torch.arange(6), torch.arange(6)
    for weight in (1.0, 0.7, 0.3):
        given = (linked.head, hidden, target, None, before, torch.tensor(weight), 0.0, linked.link_logits)
        torch.testing.assert_close(compiled(*given)[0], chunk_loss(*given)[0])
    assert counter.frame_count == 1


def test_a_large_vocabularys_teacher_is_its_likeliest_tokens_and_a_bin_for_the_rest():
    generator = torch.Generator().manual_seed(0)
    teacher_NV, student_NV = (3 * torch.randn(4, 12, generator=generator) for _ in range(2))
    student_NV.requires_grad_()
    label = [int(teacher_NV[0].argmax()), int(teacher_NV[1].argmin()), 3, 7]
    for share in (1.0, 0.3):
        blend = blended(teacher_NV, torch.tensor(label)[:, None], share, whole_vocabulary=11, likeliest=3)
        found = blend.cross_entropy(student_NV.log_softmax(-1))
        expected = []
        for n in range(4):
            p, q = teacher_NV[n].double().softmax(-1), student_NV[n].double().softmax(-1)
            kept = sorted(range(12), key=lambda v: -p[v])[:3]
            rest = [v for v in range(12) if v not in kept]
            soft = -sum(p[v] * q[v].log() for v in kept) - p[rest].sum() * q[rest].sum().log()
            expected.append(share * soft - (1 - share) * q[label[n]].log())
        torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(found.sum(), student_NV)
        (other,) = torch.autograd.grad(torch.stack(expected).sum(), student_NV)
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-5)
        assert not blend.prob_NT.requires_grad


def test_bins_of_all_tokens_but_one_are_the_whole_distribution():
    generator = torch.Generator().manual_seed(1)
    teacher_NV, student_NV = (torch.randn(5, 9, generator=generator) for _ in range(2))
    label_N1 = torch.tensor([[0], [8], [4], [4], [2]])
    logprob_NV = student_NV.log_softmax(-1)
    whole = blended(teacher_NV, label_N1, 0.6).cross_entropy(logprob_NV)
    torch.testing.assert_close(blended(teacher_NV, label_N1, 0.6, None, 8, 8).cross_entropy(logprob_NV), whole)
