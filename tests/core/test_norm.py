"""Batch normalisation against the framework's, and its derivatives of second order under `vmap`."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.layers import Layers
from ray_dfml.core.norm import OnePassMoments
from tests.support import normal, slope

SHAPES = [(6, 3, 4, 5), (7, 3)]
FORMS = pytest.mark.parametrize("first_order", [False, True], ids=["plain", "native"])


def weights(device: torch.device) -> dict[str, Tensor]:
    return {"norm.weight": normal(3, seed=10, device=device), "norm.bias": normal(3, seed=11, device=device)}


def statistics(device: torch.device) -> dict[str, Tensor]:
    mean, var = normal(3, seed=12, device=device), normal(3, seed=13, device=device).exp()
    return {"norm.running_mean": mean, "norm.running_var": var}


def layers(device: torch.device, *, given: bool = False, capture: bool = False, first_order: bool = False) -> Layers:
    return Layers(weights(device), statistics(device) if given else None, capture=capture, first_order=first_order)


def broadcast(shift: Tensor, x: Tensor) -> Tensor:
    return shift.view(1, 3, *(1,) * (x.dim() - 2))


@FORMS
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_statistics_equal_the_framework(device, shape, first_order):
    x = normal(*shape, device=device) * 3 + 1
    expected = F.batch_norm(x, None, None, *weights(device).values(), training=True)
    torch.testing.assert_close(layers(device, first_order=first_order).norm("norm", x), expected)


@FORMS
@pytest.mark.parametrize("shape", SHAPES)
def test_given_statistics_equal_the_framework(device, shape, first_order):
    x = normal(*shape, device=device) * 3 + 1
    expected = F.batch_norm(x, *statistics(device).values(), *weights(device).values(), training=False)
    torch.testing.assert_close(layers(device, given=True, first_order=first_order).norm("norm", x), expected)


@FORMS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", [False, True])
def test_a_shift_stands_for_the_bias_of_the_layer_before(device, shape, given, first_order):
    x, shift = normal(*shape, device=device), normal(3, seed=1, device=device)
    call = layers(device, given=given, first_order=first_order)
    torch.testing.assert_close(call.norm("norm", x, shift), call.norm("norm", x + broadcast(shift, x)))


@FORMS
def test_under_batch_statistics_the_shift_cancels_exactly(device, first_order):
    x, shift = normal(6, 3, 4, 4, device=device), normal(3, seed=1, device=device).requires_grad_()
    scale = normal(1, seed=2, device=device).requires_grad_()
    call = layers(device, first_order=first_order)
    out = call.norm("norm", x * scale, shift)
    assert torch.equal(out.detach(), call.norm("norm", x * scale).detach())
    assert torch.autograd.grad(out.tanh().sum(), shift, allow_unused=True) == (None,)


@FORMS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", [False, True])
def test_captured_statistics_are_those_of_the_shifted_input(device, shape, given, first_order):
    x, shift = normal(*shape, device=device), normal(3, seed=1, device=device)
    call = layers(device, given=given, capture=True, first_order=first_order)
    plain = layers(device, given=given, first_order=first_order).norm("norm", x, shift)
    torch.testing.assert_close(call.norm("norm", x, shift), plain)
    moved, axes = x + broadcast(shift, x), (0, 2, 3)[: x.dim() - 1]
    torch.testing.assert_close(call.captured["norm.running_mean"], moved.mean(axes))
    torch.testing.assert_close(call.captured["norm.running_var"], moved.var(axes, unbiased=False))


@pytest.mark.parametrize("shape", SHAPES)
def test_captured_statistics_are_differentiated_alike_in_both_forms(device, shape):
    x, shift = normal(*shape, device=device).requires_grad_(), normal(3, seed=1, device=device).requires_grad_()
    grads = []
    for first_order in (False, True):
        call = layers(device, given=True, capture=True, first_order=first_order)
        loss = call.norm("norm", x, shift).tanh().sum()
        loss = loss + (call.captured["norm.running_mean"] ** 3).sum() + call.captured["norm.running_var"].tanh().sum()
        grads.append(torch.autograd.grad(loss, (x, shift)))
    for native, plain in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(native, plain)


def test_statistics_with_a_backward_pass_of_their_own_refuse_a_second_one(device):
    x = normal(6, 3, 4, 4, device=device).requires_grad_()
    (grad,) = torch.autograd.grad(OnePassMoments.apply(x)[1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def second_order(x: Tensor, w: Tensor, *, grad) -> Tensor:
    """Squared length of the gradient of a smooth loss: what a double backward pass differentiates."""

    def loss(v: Tensor) -> Tensor:
        y = F.conv2d(x, v[:27].view(3, 1, 3, 3))
        call = Layers({"norm.weight": v[27:30], "norm.bias": v[30:]})
        return call.norm("norm", y).tanh().pow(3).mean()

    return grad(loss)(w).square().sum()


def test_second_order_gradients_under_vmap_equal_the_loop_and_finite_differences(device):
    xs, w = normal(4, 5, 1, 6, 6, device=device), normal(33, seed=1, device=device)

    def looped(x: Tensor, v: Tensor) -> Tensor:
        return second_order(x, v, grad=lambda f: lambda u: torch.autograd.grad(f(u), u, create_graph=True)[0])

    batched = torch.func.vmap(lambda x: torch.func.grad(lambda v: second_order(x, v, grad=torch.func.grad))(w))(xs)
    leaf = w.clone().requires_grad_()
    loop = torch.stack([torch.autograd.grad(looped(x, leaf), leaf)[0] for x in xs])
    torch.testing.assert_close(batched, loop, rtol=1e-8, atol=1e-10)

    direction = normal(33, seed=2, device=device)
    for x, gradient in zip(xs, batched, strict=True):
        measured = slope(lambda v, x=x: second_order(x, v, grad=torch.func.grad), w, direction)
        assert float(gradient @ direction) == pytest.approx(measured, rel=1e-7, abs=1e-9)
