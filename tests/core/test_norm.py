"""Batch normalisation against the framework's, and its derivatives of second order under `vmap`."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ray_dfml.core.norm import BatchNorm
from tests.support import normal, slope

SHAPES = [(6, 3, 4, 5), (7, 3)]


def layer(*, use_running: bool = False) -> BatchNorm:
    norm = BatchNorm(3).double().requires_grad_(False)
    norm.weight.copy_(normal(3, seed=10))
    norm.bias.copy_(normal(3, seed=11))
    norm.running_mean.copy_(normal(3, seed=12))
    norm.running_var.copy_(normal(3, seed=13).exp())
    norm.use_running = use_running
    return norm


def broadcast(shift: Tensor, x: Tensor) -> Tensor:
    return shift.view(1, 3, *(1,) * (x.dim() - 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_statistics_equal_the_framework(shape):
    norm, x = layer(), normal(*shape) * 3 + 1
    torch.testing.assert_close(norm(x), F.batch_norm(x, None, None, norm.weight, norm.bias, training=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_running_statistics_equal_the_framework(shape):
    norm, x = layer(use_running=True), normal(*shape) * 3 + 1
    expected = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use_running", [False, True])
def test_a_shift_stands_for_the_bias_of_the_layer_before(shape, use_running):
    norm, x, shift = layer(use_running=use_running), normal(*shape), normal(3, seed=1)
    torch.testing.assert_close(norm(x, shift=shift), norm(x + broadcast(shift, x)))


def test_under_batch_statistics_the_shift_cancels_exactly():
    norm, x, shift = layer(), normal(6, 3, 4, 4), normal(3, seed=1).requires_grad_()
    scale = normal(1, seed=2).requires_grad_()
    out = norm(x * scale, shift=shift)
    assert torch.equal(out.detach(), norm(x * scale).detach())
    assert torch.autograd.grad(out.tanh().sum(), shift, allow_unused=True) == (None,)


@pytest.mark.parametrize("use_running", [False, True])
def test_captured_statistics_are_those_of_the_shifted_input(use_running):
    norm, x, shift = layer(use_running=use_running), normal(6, 3, 4, 5), normal(3, seed=1)
    norm.captured = []
    norm(x, shift=shift)
    ((mean, var),) = norm.captured
    moved = x + broadcast(shift, x)
    torch.testing.assert_close(mean, moved.mean((0, 2, 3)))
    torch.testing.assert_close(var, moved.var((0, 2, 3), unbiased=False))


@pytest.mark.parametrize("use_running", [False, True])
def test_running_statistics_are_never_written(use_running):
    norm = layer(use_running=use_running)
    before = [norm.running_mean.clone(), norm.running_var.clone()]
    norm.captured = []
    norm(normal(6, 3, 4, 4))
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])


NORM = layer()


def second_order(x: Tensor, w: Tensor, *, grad) -> Tensor:
    """Squared length of the gradient of a smooth loss: what a double backward pass differentiates."""

    def loss(v: Tensor) -> Tensor:
        y = F.conv2d(x, v[:27].view(3, 1, 3, 3))
        return functional_call(NORM, {"weight": v[27:30], "bias": v[30:]}, (y,)).tanh().pow(3).mean()

    return grad(loss)(w).square().sum()


def test_second_order_gradients_under_vmap_equal_the_loop_and_finite_differences():
    xs, w = normal(4, 5, 1, 6, 6), normal(33, seed=1)

    def looped(x: Tensor, v: Tensor) -> Tensor:
        return second_order(x, v, grad=lambda f: lambda u: torch.autograd.grad(f(u), u, create_graph=True)[0])

    batched = torch.func.vmap(lambda x: torch.func.grad(lambda v: second_order(x, v, grad=torch.func.grad))(w))(xs)
    leaf = w.clone().requires_grad_()
    loop = torch.stack([torch.autograd.grad(looped(x, leaf), leaf)[0] for x in xs])
    torch.testing.assert_close(batched, loop, rtol=1e-8, atol=1e-10)

    direction = normal(33, seed=2)
    for x, gradient in zip(xs, batched, strict=True):
        measured = slope(lambda v, x=x: second_order(x, v, grad=torch.func.grad), w, direction)
        assert float(gradient @ direction) == pytest.approx(measured, rel=1e-7, abs=1e-9)
