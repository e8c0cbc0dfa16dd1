"""Influence against finite differences of the loss itself, in float64."""

import pytest
import torch

from ray_dfml.core.episodes import interleaved
from ray_dfml.core.influence import influence
from ray_dfml.core.inner_loop import Task, graph_grad, meta_gradient, query_loss
from ray_dfml.core.net import net


def tasks(count: int, rng: torch.Generator) -> Task:
    images = (torch.randn(count, n, 1, 16, 16, generator=rng, dtype=torch.float64) for n in (4, 6))
    labels = (interleaved(2, n).expand(count, -1) for n in (2, 3))
    support, query = images
    support_y, query_y = labels
    return Task(support, support_y, query, query_y)


def test_a_small_step_back_lowers_the_loss_by_the_product() -> None:
    rng = torch.Generator().manual_seed(0)
    network = net("conv4", (1, 16, 16), 2)
    theta = network.init(rng).double()
    ours, real = tasks(3, rng), tasks(2, rng)
    lr, steps, size = 0.01, 2, 1e-6
    grads = meta_gradient(network, theta, ours, lr=lr, steps=steps, batched=False).grad
    wanted = meta_gradient(network, theta, real, lr=lr, steps=steps, batched=False).grad.mean(0)
    found = influence(grads, wanted)

    def loss(at: torch.Tensor) -> float:
        leaf = at.detach().requires_grad_()
        each = [query_loss(network, leaf, Task(*one), lr, steps, graph_grad)[0] for one in zip(*real, strict=True)]
        return torch.stack(each).mean().item()

    step = size * grads.mean(0)
    measured = (loss(theta + step) - loss(theta - step)) / (2 * size)
    assert found.product == pytest.approx(measured, rel=1e-4)
    assert found.cosine == pytest.approx(found.product / float(grads.mean(0).norm() * wanted.norm()))


def test_signs_and_intervals() -> None:
    wanted = torch.tensor([1.0, 0.0])
    helps = influence(torch.tensor([[2.0, 1], [2, -1], [2, 5]]), wanted)
    assert (helps.product, helps.half, helps.helps, helps.harms) == (2, 0, True, False)
    unsure = influence(torch.tensor([[3.0, 0], [-1, 0]]), wanted)
    assert unsure.half == pytest.approx(1.96 * 8**0.5 / 2**0.5)
    assert not unsure.helps
    assert not unsure.harms
    assert influence(-torch.tensor([[2.0, 1], [2, -1]]), wanted).harms
    assert influence(torch.zeros(1, 2), wanted) == (0, float("inf"), 0)
