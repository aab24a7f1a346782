"""The optimiser of a training run: fused AdamW where the CPU updates the weights, with the updates of plain AdamW."""

import pytest
import torch
from torch import nn

from pipelines.jobs import TrainJob
from pipelines.training.train_engine import adamw

STEPS = 20


def job(**changes):
    values = {
        "shards": "shards", "output": "out", "shape": "tiny", "block_len": 4, "steps": STEPS, "rows_per_step": 8,
        "rows_per_forward": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "adam_betas": (0.9, 0.95),
    }  # fmt: skip
    return TrainJob.model_validate(values | changes)


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(48, 64)), nn.Parameter(torch.randn(64))]


@pytest.mark.parametrize(
    ("where", "fused"),
    [({"gpus_per_worker": 0}, True), ({"gpus_per_worker": 1, "offload_optimizer": "cpu"}, True),
     ({"gpus_per_worker": 1}, None)],
)  # fmt: skip
def test_adamw_is_fused_where_the_cpu_updates_the_weights(where, fused):
    groups = adamw(parameters(), job(**where)).param_groups
    assert [group["fused"] for group in groups] == [fused, fused]


def test_fused_updates_equal_those_of_a_plain_loop_and_norms_do_not_decay():
    matrix, norm = trained = parameters()
    fused = adamw(trained, job(gpus_per_worker=0))
    other_matrix, other_norm = others = parameters()
    plain = torch.optim.AdamW(
        [{"params": [other_matrix], "weight_decay": 0.1}, {"params": [other_norm], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), fused=False, foreach=False,
    )  # fmt: skip
    began = [value.detach().clone() for value in trained]
    for _ in range(STEPS):
        for mine, other in zip(trained, others):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        fused.step()
        plain.step()
    for mine, other, first in zip((matrix, norm), others, began):
        assert not torch.equal(mine, first)
        torch.testing.assert_close(mine, other, rtol=STEPS * 2**-22, atol=STEPS * 2**-22)  # few roundings in a step
