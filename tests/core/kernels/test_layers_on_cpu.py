"""Norm, gate and rotation of a train step in C, forward and backward, against plain torch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from tidar_core.kernels import compiled, layers_on_cpu
from tidar_core.transformer.model import RmsNorm

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C compiler works here")

EPS = 1e-5
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8}}


def drawn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_as_defined(function, definition, x, dtype):
    """Outputs and gradients of `function` are those of `definition` in fp64, up to one rounding."""
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    found, expected = function(ours), definition(exact)
    weight = drawn(*found.shape, dtype=dtype, seed=1)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(found.double(), expected, **CLOSE[dtype])
    torch.testing.assert_close(ours.grad.double(), exact.grad, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("width", [1, 24, 64, 577])
def test_norm(width, dtype):
    weight = drawn(width, dtype=dtype, seed=2)
    assert_as_defined(
        lambda x: layers_on_cpu.rms_norm(x, weight, EPS),
        lambda x: F.rms_norm(x, (width,), weight.double(), EPS),
        3 * drawn(2, 35, width, dtype=dtype),
        dtype,
    )


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("width", [2, 16, 100])
def test_gate(width, dtype):
    def plain(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    assert_as_defined(layers_on_cpu.silu_mul, plain, 4 * drawn(2, 35, 2 * width, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("heads", "size"), [(1, 8), (3, 64), (2, 20)])
def test_rotation_of_heads_within_a_wider_tensor(heads, size, dtype):
    angle = torch.rand(2, 35, 1, size // 2, generator=torch.Generator().manual_seed(3)) * 6
    cos, sin = (torch.cat([x, x], -1).to(dtype) for x in (angle.cos(), angle.sin()))

    def plain(x):
        first, second = x[:, :, 1 : 1 + heads].chunk(2, -1)
        cosine, sine = cos.double()[..., : size // 2], sin.double()[..., : size // 2]
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

    assert_as_defined(
        lambda x: layers_on_cpu.rotated(x[:, :, 1 : 1 + heads], cos, sin),
        plain,
        drawn(2, 35, heads + 2, size, dtype=dtype),
        dtype,
    )


def test_a_gate_far_from_zero_stays_finite():
    gate_up = torch.tensor([[-1e4, -90.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    gated = layers_on_cpu.silu_mul(gate_up)
    gated.sum().backward()
    torch.testing.assert_close(gated.detach(), torch.tensor([[0.0, 0.0, 90.0, 1e4]]))
    torch.testing.assert_close(gate_up.grad[0, :4], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_they_serve_frozen_norms_in_training_alone(monkeypatch):
    """A norm that learns, and every forward without gradients, is plain torch."""
    calls, of_kernel = [], layers_on_cpu.rms_norm
    monkeypatch.setattr(layers_on_cpu, "rms_norm", lambda *given: calls.append(1) or of_kernel(*given))
    norm, x = RmsNorm(16, EPS), drawn(3, 16, dtype=torch.float32)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    assert not calls
    norm.requires_grad_(False)
    norm(x)
    assert calls
    with torch.no_grad():
        norm(x)
    assert len(calls) == 1
