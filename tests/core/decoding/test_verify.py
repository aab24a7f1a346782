"""Verification: chosen draws, then the distribution of emitted tokens by enumeration of every outcome."""

import itertools

import pytest
import torch

from tidar_core.decoding.verify import verify_argmax, verify_sampled

NEVER_READ = 0.5


def test_drafts_are_accepted_while_they_equal_the_draws_of_the_target():
    draft = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    target = torch.tensor([[9, 7, 8, 1], [6, 9, 8, 1], [6, 7, 9, 1], [6, 7, 8, 1]])
    verdict = verify_argmax(draft, target)
    assert verdict.accepted_B.tolist() == [1, 2, 3, 4]
    assert verdict.next_B.tolist() == [9, 9, 9, 1]


def test_agreement_after_the_first_rejection_counts_for_nothing():
    verdict = verify_argmax(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[6, 0, 8, 1]]))
    assert (verdict.accepted_B.item(), verdict.next_B.item()) == (2, 0)


def test_a_block_of_one_is_the_target_alone():
    verdict = verify_argmax(torch.tensor([[5]]), torch.tensor([[3]]))
    assert (verdict.accepted_B.item(), verdict.next_B.item()) == (1, 3)


@pytest.mark.parametrize(
    ("accept", "target", "accepted", "follows"),
    [
        (0.49, 0.0, 2, 0),  # p / q = 0.25 / 0.5: kept below one half; then p itself
        (0.49, 0.99, 2, 2),
        (0.51, 0.0, 1, 0),  # refused: residual is 0.25 of token 0 and nothing else
        (0.51, 0.99, 1, 0),
    ],
)
def test_a_drawn_draft_is_kept_with_probability_p_over_q(accept, target, accepted, follows):
    p = torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]])
    q = torch.tensor([[[1.0, 0.0, 0.0], [0.25, 0.5, 0.25]]])
    verdict = verify_sampled(
        torch.tensor([[0, 1]]), p, q, torch.tensor([[accept, NEVER_READ]]), torch.tensor([[target, target]])
    )
    assert (verdict.accepted_B.item(), verdict.next_B.item()) == (accepted, follows)


def test_equal_distributions_keep_every_draft():
    p = torch.full((1, 3, 4), 0.25)
    verdict = verify_sampled(torch.tensor([[0, 3, 2]]), p, p, torch.full((1, 3), 1 - 2**-24), torch.zeros(1, 3))
    assert verdict.accepted_B.item() == 3


def test_nothing_left_over_falls_back_to_the_target():
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    verdict = verify_sampled(torch.tensor([[0, 0]]), p, p, torch.full((1, 2), 0.9), torch.tensor([[0.3, 0.3]]))
    assert (verdict.accepted_B.item(), verdict.next_B.item()) == (1, 1)


def bad_distributions(seed, positions, vocabulary):
    """Targets p(. | history) for every history, and proposals q that favour what p does not."""
    generator = torch.Generator().manual_seed(seed)
    targets = {}
    for length in range(positions):
        for history in itertools.product(range(vocabulary), repeat=length):
            targets[history] = torch.rand(vocabulary, generator=generator).pow(3).div_(1).double()
            targets[history] /= targets[history].sum()
    proposals = [torch.rand(vocabulary, generator=generator).pow(3).double() for _ in range(positions)]
    return targets, [q / q.sum() for q in proposals]


def emitted_distribution(targets, proposals, decide, positions, vocabulary, cells):
    """Exact distribution of the first tokens after d_1, by enumerating drafts and a grid of draws.

    One round gives n tokens; what it does not give is completed with the target distribution, as later rounds would.
    """
    out = {}
    grid = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    for drafts in itertools.product(range(vocabulary), repeat=positions - 1):
        weight = torch.tensor([float(q[d]) for q, d in zip(proposals[1:], drafts)]).prod().item()
        if not weight:
            continue
        draft = torch.tensor([[0, *drafts]])
        p = torch.stack([targets[drafts[:j]] for j in range(positions)])[None]
        for accept, target in itertools.product(itertools.product(grid, repeat=positions - 1), grid):
            accepts = torch.tensor([[*accept, NEVER_READ]], dtype=torch.float64)
            verdict = decide(draft, p, accepts, target.expand(1, positions))
            n = verdict.accepted_B.item()
            given = (*drafts[: n - 1], verdict.next_B.item())
            share = weight / cells**positions
            for rest in itertools.product(range(vocabulary), repeat=positions - n):
                text, probability = given + rest, share
                for j in range(n, positions):
                    probability *= float(targets[text[:j]][text[j]])
                out[text] = out.get(text, 0.0) + probability
    return out


def autoregressive_distribution(targets, positions, vocabulary):
    out = {}
    for text in itertools.product(range(vocabulary), repeat=positions):
        out[text] = 1.0
        for j in range(positions):
            out[text] *= float(targets[text[:j]][text[j]])
    return out


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_drafts_leave_the_autoregressive_distribution_exact_for_bad_proposals(seed):
    positions, vocabulary, cells = 2, 3, 60
    targets, proposals = bad_distributions(seed, positions, vocabulary)
    q = torch.stack(proposals)[None]
    total_variation = 0.5 * sum((p - r).abs().sum().item() for p, r in zip([targets[()]], proposals[1:]))
    assert total_variation > 0.2  # the proposals are bad indeed

    def decide(draft, p, accepts, targets_drawn):
        return verify_sampled(draft, p, q, accepts, targets_drawn)

    found = emitted_distribution(targets, proposals, decide, positions, vocabulary, cells)
    expected = autoregressive_distribution(targets, positions, vocabulary)
    assert sum(found.values()) == pytest.approx(1)
    for text, probability in expected.items():
        # a grid of 60 cells places each of at most three thresholds within half a cell
        assert found.get(text, 0.0) == pytest.approx(probability, abs=2.5 / cells), text


def test_a_biased_rule_would_be_noticed():
    positions, vocabulary, cells = 2, 3, 60
    targets, proposals = bad_distributions(0, positions, vocabulary)

    def keep_all(draft, p, accepts, targets_drawn):
        return verify_sampled(draft, p, torch.zeros_like(p), accepts, targets_drawn)

    found = emitted_distribution(targets, proposals, keep_all, positions, vocabulary, cells)
    expected = autoregressive_distribution(targets, positions, vocabulary)
    assert max(abs(found.get(text, 0.0) - p) for text, p in expected.items()) > 2.5 / cells


def test_a_chosen_draft_is_kept_with_the_probability_that_the_target_gives_it():
    targets, _ = bad_distributions(2, 2, 4)
    cells = 10_000
    grid = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    from tidar_core.decoding.sampling import draw

    first = draw(targets[()].expand(cells, 4), grid)
    for token in range(4):
        drafts = torch.tensor([0, token]).expand(cells, 2)
        verdict = verify_argmax(drafts, torch.stack([first, first], 1))
        kept = (verdict.accepted_B == 2).double().mean().item()
        assert kept == pytest.approx(float(targets[()][token]), abs=2 / cells)
        fallen = verdict.next_B[verdict.accepted_B == 1]
        residual = targets[()].clone()
        residual[token] = 0
        residual /= residual.sum()
        shares = torch.bincount(fallen, minlength=4).double() / len(fallen)
        assert shares.tolist() == pytest.approx(residual.tolist(), abs=4 / len(fallen))
