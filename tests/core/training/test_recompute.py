"""Layers computed again in the backward pass give the same gradients."""

import torch
from oracles import documents_row

from tidar_core.training.losses import dual_mode_loss, label_counts
from tidar_core.training.objective import Objective


def test_recomputed_layers_give_exactly_the_same_loss_and_gradients(model):
    ids = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    objective = Objective(model, dual=True, block_len=4)
    batch = objective.batch(ids, torch.cat([documents_row(24), documents_row(9, 15)]))
    forwards, results = [], []
    hook = model.layers[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    for model.recompute in (False, True):
        model.zero_grad()
        forwards.clear()
        loss = dual_mode_loss(objective(batch), 1.0, *label_counts(batch))
        loss.backward()
        results.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}, len(forwards)))
    hook.remove()
    model.recompute = False
    model.zero_grad()
    (plain, plain_grads, once), (again, again_grads, twice) = results
    assert plain == again
    assert (once, twice) == (1, 2)
    for name, grad in plain_grads.items():
        assert torch.equal(grad, again_grads[name]), name
