"""Two workers that share every row compute the same as one worker."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from oracles import documents_row
from tiny import adapted_model, wide_model

from tidar_core.errors import ConfigError
from tidar_core.training.dual_mode import dual_mode_batch
from tidar_core.training.losses import dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.recipe import Recipe
from tidar_core.training.sequence_parallel import SequenceParallel, activation_bytes
from tidar_core.transformer.draft_adapter import freeze
from tidar_core.transformer.shapes import named_shape

DOCUMENTS = torch.cat([documents_row(40, 24), documents_row(30, 11, padding=23)])
IDS = torch.randint(0, 500, DOCUMENTS.shape, generator=torch.Generator().manual_seed(0))
ALL = Recipe(
    masking="random", random_phase=True, position_decay=3.0, distillation=0.5, block_share=0.5, block_lens=(4, 8)
)
CHAINED = Recipe(
    random_phase=True, position_weights="dpace", first_weight=0.1, distillation=0.5, unlinked=0.3, consistency=0.2
)
CASES = {
    "next-token": {"dual": False},
    "dual": {"dual": True},
    "dual, one key head": {"dual": True, "kv_heads": 1},
    "dual, linked": {"dual": True, "link_rank": 4},
    "dual, frozen": {"dual": True, "link_rank": 4, "frozen": True},
    "dual, every choice of the recipe": {"dual": True, "recipe": ALL},
    "dual, weights by what is accepted": {"dual": True, "link_rank": 4, "recipe": CHAINED},
    "dual, frozen, cut to labels": {"dual": True, "link_rank": 4, "frozen": True, "recipe": CHAINED, "ragged": True},
}


def ran(shared, *, kv_heads=2, link_rank=0, frozen=False, **choices):
    """Loss sums, gradients and bytes kept, of one worker."""
    config = replace(named_shape("tiny"), kv_heads=kv_heads, link_rank=link_rank)
    model = adapted_model(config, block_len=8).train() if frozen else wide_model(config).train()
    if frozen:
        freeze(model)
    objective = Objective(model, block_len=8, shared=shared, **choices)
    batch = objective.batch(IDS, DOCUMENTS, seed_B=[3, 4], share=0.4)
    counts = torch.stack(label_counts(batch))
    if shared:
        dist.all_reduce(counts)
    with activation_bytes(model) as kept:
        sums = objective(batch)
    loss = dual_mode_loss(sums, 0.7, *counts)
    loss.backward()
    numbers = torch.cat([torch.stack([loss.detach(), *counts]), sums.draft_hits_K, sums.draft_count_K])
    return numbers, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept[0]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, choices in CASES.items():
        numbers, gradients, kept = ran(SequenceParallel.among_neighbours(2), **choices)
        for value in (numbers, *gradients.values()):
            dist.all_reduce(value)
        found[name] = numbers, gradients, kept
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of each of two workers in each case."""
    folder = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_workers_that_share_a_row_equal_one_in_loss_and_gradients(found, name):
    numbers, gradients, _ = ran(None, **CASES[name])
    for rank in range(2):
        ours, our_gradients, _ = found[rank][name]
        counted_twice = torch.tensor([1, 2, 2, *[1] * 16])
        torch.testing.assert_close(ours, numbers * counted_twice, rtol=1e-6, atol=0)
        for weight, gradient in gradients.items():
            # the same sums in fp32, in another order
            torch.testing.assert_close(our_gradients[weight], gradient, rtol=1e-4, atol=1e-5, msg=weight)


@pytest.mark.parametrize("name", CASES)
def test_each_of_two_workers_keeps_about_half_of_the_activations(found, name):
    whole = ran(None, **CASES[name])[2]
    for rank in range(2):
        assert 0.4 < found[rank][name][2] / whole < 0.65


def test_a_worker_holds_its_run_of_both_halves():
    batch = dual_mode_batch(IDS[:1, :8], documents_row(8), 2, 511)
    part = SequenceParallel(None, 4, 1).part(batch)
    assert part.token_BL.tolist() == [[*IDS[0, 2:4].tolist(), 511, 511]]
    assert part.layout.position.tolist() == [[2, 3, 2, 3]]
    assert part.ar_target_BS.tolist() == [IDS[0, 3:5].tolist()]
    assert part.diffusion_target_BM.tolist() == [IDS[0, 2:4].tolist()]
    assert part.whole is batch.layout


def test_workers_that_do_not_divide_rows_or_heads_are_refused():
    batch = dual_mode_batch(IDS, DOCUMENTS, 8, 511)
    with pytest.raises(ConfigError, match="sequence_parallel is 3; it must divide the 64 tokens"):
        SequenceParallel(None, 3, 0).part(batch)
    attention = SequenceParallel(None, 3, 0).attention(None, 8)
    with pytest.raises(ConfigError, match="must divide the model's 4 heads"):
        attention(0, *torch.zeros(3, 1, 16, 4, 8))


def test_kept_bytes_are_those_of_the_graph():
    module = torch.nn.Linear(8, 16, bias=False)
    x = torch.zeros(4, 8, requires_grad=True)
    with activation_bytes(module) as kept:
        module(x).exp()
    assert kept == [4 * (4 * 8 + 4 * 16)]  # the input of the product, the output of exp; not the weight
