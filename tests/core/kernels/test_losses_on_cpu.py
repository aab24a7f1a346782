"""Losses of labels in C, against plain torch and against fp64 from the definition."""

import pytest
import torch

from tidar_core.kernels import compiled, losses_on_cpu
from tidar_core.training.losses import plain_losses

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C compiler works here")

N = 37
FORMS = {
    "label": (False, False, 0.0),
    "link": (True, False, 0.0),
    "link and the loss without it": (True, False, 0.3),
    "teacher": (False, True, 0.0),
    "everything": (True, True, 0.7),
}


def given(form, width, dtype):
    link, teacher, unlinked = FORMS[form]
    generator = torch.Generator().manual_seed(width)
    plain, by_link, taught = ((4 * torch.randn(N, width, generator=generator)).to(dtype) for _ in range(3))
    label = torch.randint(0, width, (N,), generator=generator)
    label[:2] = torch.tensor([0, width - 1])
    return plain, by_link if link else None, taught if teacher else None, label, 0.4, unlinked


def defined(plain, link, teacher, label, share, unlinked):
    """Losses and their cross-entropies in fp64, one label and one token at a time."""
    losses, entropies = [], []
    for n in range(len(plain)):
        target = torch.zeros(plain.shape[1], dtype=torch.float64)
        target[label[n]] = 1.0
        if teacher is not None:
            target = (1 - share) * target + share * teacher[n].double().softmax(0)
        with_link = plain[n] if link is None else plain[n] + link[n]
        of = [-(target * x.log_softmax(0)).where(target > 0, 0.0).sum() for x in (with_link, plain[n])]
        losses.append(of[0] if link is None else (of[0] + unlinked * of[1]) / (1 + unlinked))
        entropies.append(-with_link.log_softmax(0)[label[n]])
    return torch.stack(losses), torch.stack(entropies)


@pytest.mark.parametrize("width", [3, 16, 77, 4099])
@pytest.mark.parametrize("form", FORMS)
def test_fp32_losses_and_gradients_are_those_of_the_definition(form, width):
    plain, link, teacher, label, *weights = given(form, width, torch.float32)
    inputs = [x for x in (plain, link) if x is not None]
    wide = [x.double().requires_grad_() for x in inputs]
    expected, entropy = defined(wide[0], wide[1] if link is not None else None, teacher, label, *weights)
    scale = torch.linspace(-1, 2, N)
    (expected * scale).sum().backward()
    for x in inputs:
        x.requires_grad_()
    loss, found_entropy, likeliest = losses_on_cpu.token_losses(plain, link, teacher, label, *weights)
    (loss * scale).sum().backward()
    # sums of up to 4,099 fp32 terms, and exp up to 1e-7
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found_entropy.double(), entropy, rtol=2e-6, atol=2e-6)
    for x, y in zip(inputs, wide):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(likeliest, sum(x.detach() for x in inputs).argmax(-1))
    assert not found_entropy.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_bf16_losses_are_those_of_plain_torch(form):
    plain, link, teacher, label, share, unlinked = given(form, 300, torch.bfloat16)
    gradients, losses = [], []
    for fused in (True, False):
        inputs = [x.clone().requires_grad_() for x in (plain, link) if x is not None]
        first, by_link = inputs[0], inputs[1] if link is not None else None
        if fused:
            loss, *others = losses_on_cpu.token_losses(first, by_link, teacher, label, share, unlinked)
        else:
            loss, *others = plain_losses(first, by_link, teacher, label, share, torch.tensor(unlinked), None)
        loss.sum().backward()
        gradients.append([x.grad.float() for x in inputs])
        losses.append([loss.detach(), *others])
    for ours, torchs in zip(*losses):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
    for ours, torchs in zip(*gradients):  # rounded to bf16 once, where torch adds two rounded gradients
        torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_token_of_minus_infinity_has_no_chance_and_no_gradient(dtype):
    plain, _, teacher, label, share, _ = given("teacher", 50, dtype)
    mask = 20
    label[label == mask] = 21
    plain[:, mask] = teacher[:, mask] = float("-inf")
    plain.requires_grad_()
    loss, _, likeliest = losses_on_cpu.token_losses(plain, None, teacher, label, share, 0.0)
    loss.sum().backward()
    expected, _, _ = plain_losses(plain.detach(), None, teacher, label, share, None, mask)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(plain.grad).all()
    assert (plain.grad[:, mask] == 0).all()
    assert (likeliest != mask).all()


def test_logits_that_are_not_finite_give_losses_and_gradients_that_are_not():
    """A run that diverges is stopped by them."""
    plain, link, teacher, *rest = given("everything", 64, torch.float32)
    plain[3, 5], link[4, 6], teacher[5, 63], plain[6, 0] = float("nan"), float("inf"), float("nan"), float("-inf")
    plain.requires_grad_()
    loss, *_ = losses_on_cpu.token_losses(plain, link, teacher, *rest)
    loss.sum().backward()
    odd = [3, 4, 5]
    assert not torch.isfinite(loss[odd]).any()
    assert not torch.isfinite(plain.grad[odd]).any()
    assert torch.isfinite(loss[[0, 1, 2, 7]]).all()


def test_equal_logits_choose_the_first_token_as_torch_does():
    plain = torch.zeros(2, 40)
    plain[1, [7, 9, 33]] = 1.0
    label = torch.zeros(2, dtype=torch.long)
    likeliest = losses_on_cpu.token_losses(plain, None, None, label, 0.0, 0.0)[2]
    assert likeliest.tolist() == plain.argmax(-1).tolist() == [0, 7]
