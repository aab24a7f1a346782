"""Each choice of the recipe: what it does to a row, typed out or by a loop; its draws change no expectation."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracles import documents_row

from tidar_core.errors import ConfigError
from tidar_core.training.dual_mode import IGNORED, dual_mode_batch
from tidar_core.training.losses import chunk_loss, dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.recipe import Draws, Recipe, mask_embedding, start_mask_token
from tidar_core.transformer.attention import DenseAttention, PiecewiseAttention
from tidar_core.transformer.model import TidarModel

MASK, i = 511, IGNORED
CPU = torch.device("cpu")
IDS = torch.randint(0, 500, (1, 24), generator=torch.Generator().manual_seed(0))
DOCUMENTS = documents_row(13, 9, padding=2)  # with K = 4: labels at 4..12 and 17..21


def batch(recipe, seed=0, ids=IDS, documents=DOCUMENTS, block_len=4):
    return dual_mode_batch(ids, documents, block_len, MASK, recipe=recipe, seed_B=[seed])


def test_the_default_recipe_is_the_papers_full_masking_with_equal_weights():
    plain = dual_mode_batch(IDS, DOCUMENTS, 4, MASK)
    assert plain.token_BL[0, 24:].tolist() == [MASK] * 24
    assert (plain.diffusion_weight_BM, plain.diffusion_total, plain.teacher_BM) == (None, None, None)
    assert [n.item() for n in label_counts(plain)] == [12 + 8, 9 + 5]
    assert Recipe().alpha == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": -1}, "alpha is -1"),
        ({"masking": "half"}, "one of"),
        ({"block_lens": (4, 0)}, "at least 1"),
        ({"position_weights": "linear"}, "one of"),
        ({"position_decay": 0}, "above 0"),
        ({"position_weights": "flat", "position_decay": 4}, "flat weights have no decay"),
        ({"dpace_after": 1}, "below 1"),
        ({"first_weight": -1}, "0 or more"),
        ({"distillation": 1.5}, r"within 0\.\.1"),
        ({"unlinked": 2}, r"unlinked is 2; it must be within 0\.\.1"),
        ({"consistency": -1}, "consistency is -1"),
        ({"block_share": 0}, "above 0"),
        ({"mask_start": "eos"}, "mask_start"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        Recipe(**change)


def test_block_len_is_the_longest_of_the_lengths_that_are_mixed(model):
    with pytest.raises(ConfigError, match=r"\(2, 4\); the longest of them must be block_len, 8"):
        Objective(model, dual=True, block_len=8, recipe=Recipe(block_lens=(2, 4)))


def test_later_tokens_of_a_block_weigh_less():
    made = batch(Recipe(position_decay=2.0))
    a, b, c = math.exp(-0.5), math.exp(-1), math.exp(-1.5)
    expected = [[1, a, b, c] * 3 + [1] + [1, a, b, c] * 2 + [1] + [1, a]]
    torch.testing.assert_close(made.diffusion_weight_BM, torch.tensor(expected))
    # labels at offsets 0..3, 0..3 and 0 of the first document, 0..3 and 0 of the second
    assert made.diffusion_total.item() == pytest.approx(5 + 3 * (a + b + c))


def test_a_weighted_mean_is_over_the_weights(model):
    objective = Objective(model, dual=True, block_len=4, recipe=Recipe(position_decay=1e-3))
    made = objective.batch(IDS, DOCUMENTS)
    with torch.no_grad():
        loss = dual_mode_loss(objective(made), 0.0, *label_counts(made))
        every = logits(model, dual_mode_batch(IDS, DOCUMENTS, 4, MASK))[0, 24:]
    first = [4, 8, 12, 17, 21]  # of each block: all that weighs something
    expected = F.cross_entropy(every[first], IDS[0, first])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_each_row_draws_one_block_length_and_all_come_as_often():
    recipe, drawn = Recipe(block_lens=(2, 4, 8)), Counter()
    for seed in range(300):
        layout = batch(recipe, seed, block_len=8).layout
        block_len = 1 + (layout.position - layout.horizon - 1)[0, 24:].max().item()
        assert torch.equal(layout.block[0, 24:], layout.position[0, 24:] // block_len)
        drawn[block_len] += 1
    assert set(drawn) == {2, 4, 8}
    assert all(70 < count < 130 for count in drawn.values())  # 100 each; four standard deviations are 33


def test_each_row_draws_the_phase_of_its_blocks_and_all_come_as_often():
    drawn = Counter()
    for seed in range(400):
        made = batch(Recipe(random_phase=True), seed)
        horizon = made.layout.horizon[0, 24:]
        phase = 4 - (horizon[:13] == -1).sum().item()  # tokens that the first block lacks
        expected = []
        for place in range(24):
            position, length = (place, 13) if place < 13 else (place - 13, 9)
            blind = place >= 22 or position < 4 - phase  # padding, or no clean token is before the block
            expected.append(i if blind else IDS[0, place].item())
            if position < length and place < 22:
                assert horizon[place] == max((position + phase) // 4 * 4 - phase, 0) - 1
        assert made.diffusion_target_BM[0].tolist() == expected
        drawn[phase] += 1
    assert set(drawn) == {0, 1, 2, 3}
    assert all(65 < count < 135 for count in drawn.values())  # 100 each; four standard deviations are 35


def test_a_phase_is_below_the_length_that_the_row_draws():
    recipe = Recipe(random_phase=True, block_lens=(1, 8))
    for seed in range(40):
        masks = batch(recipe, seed, block_len=8).layout[0, 24:]
        offset = masks.position - masks.horizon - 1
        assert offset.max() in (0, 6, 7)  # 13 tokens always hold a block of 8, or of 7 between two cuts
        assert masks.horizon[12] >= 4


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("recipe", [Recipe(random_phase=True, visits=3, first_weight=0.5),
                                    Recipe(random_phase=True, visits=2, position_weights="dpace", distillation=0.5,
                                           dpace_after=0.0)], ids=["3 visits", "2 visits, dpace"])  # fmt: skip
def test_mask_halves_of_several_visits_add_up_and_see_nothing_of_each_other(model, recipe, ragged):
    objective = Objective(model, dual=True, block_len=4, recipe=recipe, attention=PiecewiseAttention, ragged=ragged)
    made = objective.batch(IDS, DOCUMENTS, seed_B=[5], share=0.5)
    starts = [offset for offset in range(4) if offset_starts(made, offset)]
    assert len(starts) >= recipe.visits  # the phases differ
    blocks = made.layout.block[0, 24:].tolist()
    assert {block // 25 for block in blocks} == {*range(recipe.visits)}
    visit = torch.tensor([block // 25 for block in blocks])
    sums, total = objective(made), made.diffusion_total
    parts = []
    for number in range(recipe.visits):
        chosen = (visit == number).nonzero()[:, 0]
        both = torch.cat([torch.arange(24), 24 + chosen])
        some = {name: getattr(made, name)[:, chosen] for name in ("diffusion_target_BM", "before_BM")}
        weight, teacher = made.diffusion_weight_BM, made.teacher_BM
        parts.append(objective(replace(
            made, token_BL=made.token_BL[:, both], layout=made.layout[:, both], **some,
            diffusion_weight_BM=None if weight is None else weight[:, chosen],
            teacher_BM=None if teacher is None else teacher[:, chosen], diffusion_total=total,
        )))  # fmt: skip
    together = sum(part.diffusion_sum for part in parts).item()
    assert together == pytest.approx(sums.diffusion_sum.item(), rel=1e-5)
    assert torch.equal(sum(part.draft_count_K for part in parts), sums.draft_count_K)


def offset_starts(made, offset):
    """Whether a block of the first document begins at a position that is `offset` modulo 4."""
    mask = made.layout[:, 24:]
    first = (mask.offset == 0) & (mask.block % 25 > 0) & (mask.document == 0)
    return bool((mask.position[first] % 4 == offset).any())


def test_visits_need_phases_that_set_them_apart():
    with pytest.raises(ConfigError, match="random_phase: true"):
        Recipe(visits=2)


def test_earlier_draws_of_a_seed_stay_when_a_new_one_is_added():
    earlier = torch.rand(1 + 3 * 24, generator=torch.Generator().manual_seed(5))
    draws = Draws.of([5], 24, CPU)
    assert torch.equal(torch.cat([draws.length_B1, draws.share_BS, draws.hidden_BS, draws.rank_BS], 1)[0], earlier)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_masking_shows_what_was_not_hidden_and_weighs_the_rest_by_its_share(seed):
    made, draws = batch(Recipe(masking="random"), seed), Draws.of([seed], 24, CPU)
    documents = [(0, 13), (13, 22)]
    for begin, end in documents:
        for s in range(begin, end):
            start = begin + (s - begin) // 4 * 4
            t = max(1 - draws.share_BS[0, start].item(), 1e-3)
            hidden = draws.hidden_BS[0, s].item() < t
            labelled = hidden and s - begin >= 4
            assert made.token_BL[0, 24 + s] == (MASK if hidden else IDS[0, s])
            assert made.diffusion_target_BM[0, s] == (IDS[0, s] if labelled else i)
            assert made.diffusion_weight_BM[0, s].item() == pytest.approx(1 / t, rel=1e-5)
    assert made.token_BL[0, :24].tolist() == IDS[0].tolist()
    assert made.diffusion_total == 14  # what the weights are on average


@pytest.mark.parametrize(
    "recipe", [Recipe(masking="random"), Recipe(block_share=0.5), Recipe(masking="random", block_share=0.4)]
)
def test_what_a_label_weighs_is_unbiased_over_the_draws(recipe):
    times, weight_S = 4000, torch.zeros(24, dtype=torch.float64)
    ids, documents = (x.expand(times, -1) for x in (IDS, DOCUMENTS))
    made = dual_mode_batch(ids, documents, 4, MASK, recipe=recipe, seed_B=range(times))
    weight_BM = torch.where(made.diffusion_target_BM != i, made.diffusion_weight_BM, 0)
    weight_S.index_add_(0, places(made).flatten(), weight_BM.flatten().double())
    labelled = batch(Recipe()).diffusion_target_BM[0] != i
    assert (weight_S[~labelled] == 0).all()
    # a weight is 1 on average; its variance is below ln(1000) * 2.5, so four standard deviations are below 0.27
    assert ((weight_S[labelled] / times - 1).abs() < 0.27).all()
    assert weight_S[labelled].mean().item() / times == pytest.approx(1, abs=0.1)


def places(made):
    """Index in the row of each token of the mask half; 0 for padding."""
    mask = made.layout[:, 24:]
    return torch.where(mask.document >= 0, mask.position + 13 * (mask.document == 1), 0)


@pytest.mark.parametrize("form", [DenseAttention, PiecewiseAttention])
def test_a_block_that_is_drawn_reads_what_it_reads_among_all_blocks(model, form):
    made = batch(Recipe(block_share=0.5), seed=3)
    assert made.token_BL.shape == (1, 24 + 12)
    with torch.no_grad():
        some = model.head(model(made.token_BL, made.layout.position, form(made.layout)))[0, 24:]
        every = logits(model, dual_mode_batch(IDS, DOCUMENTS, 4, MASK))[0, 24:]
    kept = made.diffusion_target_BM[0] != i
    torch.testing.assert_close(some[kept][:, :MASK], every[places(made)[0][kept]][:, :MASK], rtol=0, atol=1e-5)
    assert torch.equal(made.diffusion_target_BM[0][kept], IDS[0, places(made)[0][kept]])
    masks = made.layout[0, 24:]
    assert len({*zip(masks.document[kept].tolist(), masks.block[kept].tolist())}) == 3  # of five with labels
    assert torch.allclose(made.diffusion_weight_BM[0][kept], torch.tensor(5 / 3))


def test_distillation_compares_with_the_clean_tokens_own_distribution(model):
    recipe = Recipe(distillation=0.25)
    objective = Objective(model, dual=True, block_len=4, recipe=recipe)
    with torch.no_grad():
        sums = objective(objective.batch(IDS, DOCUMENTS))
        every = logits(model, dual_mode_batch(IDS, DOCUMENTS, 4, MASK))[0, :, :MASK].double()
    expected = 0.0
    for s in [*range(4, 13), *range(17, 22)]:
        student = every[24 + s].log_softmax(-1)
        teacher = every[s - 1].softmax(-1)
        expected -= 0.75 * student[IDS[0, s]].item() + 0.25 * (teacher * student).sum().item()
    assert sums.diffusion_sum.item() == pytest.approx(expected, rel=1e-5)


def test_no_gradient_flows_through_the_teacher():
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    student, teacher = (torch.randn(3, 4, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (1, 2))
    target = torch.tensor([2, i, 5])
    loss_N, _, _ = chunk_loss(lambda hidden: hidden @ weight.T, student, target, teacher, distillation=1.0)
    loss_N.sum().backward()
    assert teacher.grad is None
    found, weight.grad = weight.grad, None
    fixed = (teacher @ weight.T).softmax(-1).detach()
    F.cross_entropy((student @ weight.T)[[0, 2]], fixed[[0, 2]], reduction="sum").backward()
    torch.testing.assert_close(found, weight.grad)
    assert student.grad[1].tolist() == [0, 0, 0, 0]  # no label, no loss


def test_chunks_of_logits_change_neither_a_weighted_nor_a_distilled_loss(model):
    recipe = Recipe(masking="random", position_decay=3.0, distillation=0.5, block_share=0.7, block_lens=(2, 4))
    made = Objective(model, dual=True, block_len=4, recipe=recipe).batch(
        IDS.repeat(3, 1), DOCUMENTS.repeat(3, 1), seed_B=[1, 2, 3]
    )
    found = []
    for at_once in (None, 512 * 7):
        objective = Objective(model, dual=True, block_len=4, recipe=recipe, logits_at_once=at_once)
        model.zero_grad()
        loss = dual_mode_loss(objective(made), 1.0, *label_counts(made))
        loss.backward()
        found.append((loss.item(), model.embedding.weight.grad.clone()))
    model.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1].isfinite().all()
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)


def test_draws_of_a_row_do_not_depend_on_the_rows_beside_it():
    recipe = Recipe(masking="random", block_share=0.5, block_lens=(2, 4), random_phase=True)
    together = dual_mode_batch(IDS.repeat(2, 1), DOCUMENTS.repeat(2, 1), 4, MASK, recipe=recipe, seed_B=[8, 2**63 + 9])
    alone = batch(recipe, 2**63 + 9)
    assert torch.equal(together.token_BL[1:], alone.token_BL)
    assert torch.equal(together.layout.horizon[1:], alone.layout.horizon)
    assert torch.equal(together.diffusion_target_BM[1:], alone.diffusion_target_BM)
    assert torch.equal(together.diffusion_weight_BM[1:], alone.diffusion_weight_BM)


def test_the_mask_embedding_starts_as_the_recipe_requires(model):
    real = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]])
    noise = torch.tensor([1.0, -1.0])
    assert mask_embedding(real, "zero", noise).tolist() == [0, 0]
    assert mask_embedding(real, "mean", noise).tolist() == pytest.approx([3 + 0.2, 6 - 0.4])
    assert mask_embedding(real, "normal", noise).tolist() == pytest.approx([3 + 2, 6 - 4])
    own = TidarModel(model.config)
    own.init_weights(0)
    before = own.embedding.weight.detach().clone()
    start_mask_token(own, "zero", seed=0)
    assert own.embedding.weight[MASK].tolist() == [0] * 32
    assert torch.equal(own.embedding.weight[:MASK], before[:MASK])


def logits(model, made):
    with torch.no_grad():
        return model.head(model(made.token_BL, made.layout.position, DenseAttention(made.layout)))
