"""Sanity of a correct trainer: labels, the two losses, and what may not leak."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracles import documents_row

from tidar_core.training import losses
from tidar_core.training.dual_mode import IGNORED, ar_batch, dual_mode_batch
from tidar_core.training.losses import dual_mode_loss, label_counts, loss_sums
from tidar_core.training.objective import Objective
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import causal_layout

MASK = 511


def hidden(model, batch):
    with torch.no_grad():
        return model(batch.token_BL, batch.layout.position, DenseAttention(batch.layout))


def logits(model, batch):
    with torch.no_grad():
        return model.head(hidden(model, batch))


def test_clean_targets_are_shifted_mask_targets_are_not():
    ids = torch.tensor([[10, 11, 12, 13, 14, 20, 21, 22, 0]])
    batch = dual_mode_batch(ids, documents_row(5, 3, padding=1), 2, MASK)
    i = IGNORED
    assert batch.ar_target_BS.tolist() == [[11, 12, 13, 14, i, 21, 22, i, i]]
    assert batch.diffusion_target_BM.tolist() == [[i, i, 12, 13, 14, i, i, 22, i]]
    assert batch.token_BL[0].tolist() == [*ids[0].tolist(), *[MASK] * 9]


@pytest.mark.parametrize("dual", [False, True])
def test_a_token_that_is_not_trained_is_the_label_of_neither_half(model, dual):
    ids = torch.tensor([[10, 11, 12, 13, 14, 20, 21, 22, 0]])
    trained = torch.tensor([[False, False, False, True, True, True, True, False, True]])
    batch = Objective(model, dual=dual, block_len=2).batch(ids, documents_row(5, 3, padding=1), trained)
    i = IGNORED
    assert batch.ar_target_BS.tolist() == [[i, i, 13, 14, i, 21, i, i, i]]
    if dual:
        assert batch.diffusion_target_BM.tolist() == [[i, i, i, 13, 14, i, i, i, i]]
    assert batch.token_BL[0, :9].tolist() == ids[0].tolist()  # it is read all the same


def test_next_token_training_has_no_mask_half():
    batch = ar_batch(torch.tensor([[10, 11, 20, 21]]), documents_row(2, 2))
    assert batch.token_BL.tolist() == [[10, 11, 20, 21]]
    assert batch.ar_target_BS.tolist() == [[11, IGNORED, 21, IGNORED]]
    assert batch.diffusion_target_BM is None


def test_clean_logits_do_not_change_when_the_mask_half_is_removed(model):
    ids = torch.randint(0, 500, (1, 24), generator=torch.Generator().manual_seed(0))
    documents = documents_row(17, 7)
    both = logits(model, dual_mode_batch(ids, documents, 4, MASK))[:, :24]
    alone = logits(model, ar_batch(ids, documents))
    # the same sums over the same keys; masked ones add exact zeros, in a longer reduction
    torch.testing.assert_close(both[..., :MASK], alone[..., :MASK], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", [0, 3, 8, 15])
def test_a_changed_token_reaches_only_later_blocks_of_its_document(model, changed):
    ids = torch.randint(0, 500, (1, 24), generator=torch.Generator().manual_seed(1))
    documents = documents_row(16, 8)
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 1) % 500
    block_len = 4
    before, after = (hidden(model, dual_mode_batch(x, documents, block_len, MASK))[0, 24:] for x in (ids, other))
    moved = ~torch.isclose(before, after, rtol=0, atol=1e-6).all(-1)
    expected = [p < 16 and (p // block_len) * block_len > changed for p in range(24)]
    assert moved.tolist() == expected


def test_blocks_that_follow_do_not_reach_back(model):
    ids = torch.randint(0, 500, (1, 24), generator=torch.Generator().manual_seed(2))
    whole = hidden(model, dual_mode_batch(ids, documents_row(24), 4, MASK))[0, 24:36]
    cut = hidden(model, dual_mode_batch(ids[:, :12], documents_row(12), 4, MASK))[0, 12:]
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-5)


def test_loss_sums_equal_a_loop_over_labels(model):
    ids = torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(3))
    documents = torch.cat([documents_row(13, 7), documents_row(15, padding=5)])
    batch = dual_mode_batch(ids, documents, 4, MASK)
    sums = loss_sums(hidden(model, batch), model.head, batch, 4)
    every = logits(model, batch)
    ar = diffusion = 0.0
    hits = [0] * 4
    for b in range(2):
        for s in range(20):
            if (target := batch.ar_target_BS[b, s]) != IGNORED:
                ar -= F.log_softmax(every[b, s], -1)[target]
            if (target := batch.diffusion_target_BM[b, s]) != IGNORED:
                diffusion -= F.log_softmax(every[b, 20 + s], -1)[target]
                hits[batch.layout.position[b, s] % 4] += int(every[b, 20 + s].argmax() == target)
    assert sums.ar_sum.item() == pytest.approx(float(ar), rel=1e-5)
    assert sums.diffusion_sum.item() == pytest.approx(float(diffusion), rel=1e-5)
    assert sums.draft_hits_K.tolist() == hits
    assert sums.ar_count.item() == 12 + 6 + 14
    assert sums.diffusion_count.item() == 9 + 3 + 11


def test_chunks_of_logits_change_neither_loss_nor_gradient(model):
    ids = torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(4))
    batch = Objective(model, dual=True, block_len=4).batch(ids, documents_row(20).repeat(2, 1))
    results = []
    for at_once in (None, 512 * 7):
        objective = Objective(model, dual=True, block_len=4, logits_at_once=at_once)
        model.zero_grad()
        sums = objective(batch)
        dual_mode_loss(sums, 1.0, *label_counts(batch)).backward()
        results.append((sums.diffusion_sum.item(), model.embedding.weight.grad.clone()))
    model.zero_grad()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-6)


def test_the_loss_is_equation_3_of_the_paper():
    sums = losses.LossSums(*(torch.tensor(float(x)) for x in (6, 20, 3, 5)), torch.zeros(2), torch.zeros(2))
    counts = torch.tensor(3), torch.tensor(5)
    assert dual_mode_loss(sums, 1.0, *counts).item() == pytest.approx((2 + 4) / 2)
    assert dual_mode_loss(sums, 0.5, *counts).item() == pytest.approx((0.5 * 2 + 4) / 1.5)
    assert dual_mode_loss(replace(sums), 1.0, torch.tensor(3), torch.tensor(0)).item() == pytest.approx(2)


def test_shares_of_two_forwards_add_up_to_the_loss_of_one(model):
    ids = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(5))
    documents = torch.cat([documents_row(24), documents_row(6, padding=18)])
    objective = Objective(model, dual=True, block_len=4)
    whole = objective.batch(ids, documents)
    parts = [objective.batch(ids[b : b + 1], documents[b : b + 1]) for b in range(2)]
    counts = label_counts(whole)
    with torch.no_grad():
        together = dual_mode_loss(objective(whole), 1.0, *counts)
        apart = sum(dual_mode_loss(objective(part), 1.0, *counts) for part in parts)
    assert apart.item() == pytest.approx(together.item(), rel=1e-5)


def test_an_untrained_models_diffusion_loss_is_near_that_of_a_guess(model):
    fresh = type(model)(model.config)
    fresh.init_weights(0)
    ids = torch.randint(0, 500, (4, 64), generator=torch.Generator().manual_seed(6))
    objective = Objective(fresh, dual=True, block_len=8)
    with torch.no_grad():
        sums = objective(objective.batch(ids, documents_row(64).repeat(4, 1)))
    assert sums.diffusion_sum.item() / sums.diffusion_count.item() == pytest.approx(math.log(511), rel=0.02)


def test_the_mask_token_has_no_probability_and_gets_no_gradient_from_the_head(model):
    layout = causal_layout(documents_row(8))
    ids = torch.arange(8)[None]
    every = model.head(model(ids, layout.position, DenseAttention(layout)))
    assert every[..., MASK].isneginf().all()
    F.cross_entropy(every[0], ids[0]).backward()
    assert torch.equal(model.embedding.weight.grad[MASK], torch.zeros(32))
    model.zero_grad()


def test_a_tiny_model_learns_a_repeated_text_in_both_modes(model):
    torch.manual_seed(0)
    fresh = type(model)(model.config)
    fresh.init_weights(0)
    text = torch.arange(16).repeat(4)[None]
    objective = Objective(fresh, dual=True, block_len=4)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
    batch = objective.batch(text, torch.zeros_like(text))
    counts = label_counts(batch)
    for _ in range(60):
        optimizer.zero_grad()
        sums = objective(batch)
        dual_mode_loss(sums, 1.0, *counts).backward()
        optimizer.step()
    assert sums.ar_sum / counts[0] < 0.3
    assert sums.diffusion_sum / counts[1] < 0.3
    assert (sums.draft_hits_K / sums.draft_count_K > 0.9).all()
