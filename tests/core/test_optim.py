"""Optimiser steps against the framework's optimisers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.core import optim
from tests.support import PROPERTY, normal


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.999)])
def test_adam_equals_the_framework_over_twenty_steps(device, betas):
    x = normal(50, device=device)
    reference = x.clone().requires_grad_()
    theirs = torch.optim.Adam([reference], lr=1e-2, betas=betas)
    state = optim.Adam.zeros(x)
    for i in range(20):
        grad = normal(50, seed=i + 1, device=device) * 10.0 ** (i % 4 - 2)
        reference.grad = grad
        theirs.step()
        x, state = optim.adam_step(x, grad, state, lr=1e-2, betas=betas)
        torch.testing.assert_close(x, reference.detach(), rtol=1e-12, atol=1e-14)
    assert state.step == 20


def test_the_first_adam_step_is_the_sign_of_the_gradient(device):
    grad = torch.tensor([3.0, -0.01, 200.0], device=device)
    x, _ = optim.adam_step(torch.zeros(3, device=device), grad, optim.Adam.zeros(grad), lr=1e-3)
    torch.testing.assert_close(x, -1e-3 * grad.sign(), rtol=1e-5, atol=0)


def test_sgd_equals_the_framework_over_twenty_steps(device):
    x = normal(50, device=device)
    reference = x.clone().requires_grad_()
    theirs = torch.optim.SGD([reference], lr=0.05, momentum=0.9, weight_decay=5e-4)
    velocity = torch.zeros_like(x)
    for i in range(20):
        grad = normal(50, seed=i + 1, device=device)
        reference.grad = grad
        theirs.step()
        x, velocity = optim.sgd_step(x, grad, velocity, lr=0.05, momentum=0.9, weight_decay=5e-4)
        torch.testing.assert_close(x, reference.detach(), rtol=1e-12, atol=1e-14)


@PROPERTY
@given(st.integers(1, 20), st.floats(1e-3, 100), st.floats(1e-2, 50))
def test_clipping_equals_the_framework_and_bounds_the_norm(device, size, scale, bound):
    grad = normal(size, seed=size, device=device) * scale
    reference = torch.zeros(size, dtype=torch.float64, requires_grad=True, device=device)
    reference.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_([reference], bound)
    found = optim.clip_norm(grad, bound)
    torch.testing.assert_close(found, reference.grad)
    assert found.norm() <= bound * (1 + 1e-9)
    if grad.norm() < 0.99 * bound:
        assert torch.equal(found, grad)


def test_steps_change_nothing_in_place(device):
    x, grad, state = (
        normal(5, device=device),
        normal(5, seed=1, device=device),
        optim.Adam(normal(5, seed=2, device=device), normal(5, seed=3, device=device).abs(), 4),
    )
    copies = [t.clone() for t in (x, grad, state.m, state.v)]
    optim.adam_step(x, grad, state, lr=0.1)
    optim.sgd_step(x, grad, state.m, lr=0.1, momentum=0.9, weight_decay=0.1)
    optim.clip_norm(grad, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip((x, grad, state.m, state.v), copies, strict=True))
    assert state.step == 4
