"""The hand-written passes of a Conv4 against autograd, finite differences, and the definition of adaptation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import inner_loop
from ray_dfml.core.conv4 import Conv4Passes, lay
from ray_dfml.core.inner_loop import (
    GROUP,
    MetaGradient,
    Task,
    adapted,
    adapted_each,
    by_hand,
    graph_grad,
    meta_gradient,
    plain_grad,
)
from ray_dfml.core.net import Net
from tests.support import CPU, normal, slope

CASES = pytest.mark.parametrize(
    ("arch", "shape", "shot"),
    [
        ("conv4", (3, 32, 32), 5),
        ("conv4", (1, 28, 28), 1),
        ("conv4", (3, 84, 84), 1),
        ("conv4-64", (3, 32, 32), 1),
        ("conv4-64", (1, 28, 28), 5),
        ("conv4-adaptive", (3, 32, 32), 1),
        ("conv4-adaptive", (1, 19, 26), 2),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
GAMMAS = pytest.mark.parametrize("gammas", ["positive", "negative", "mixed", "zero"])
WAY = 2


def weights(net: Net, gammas: str = "mixed", device: torch.device = CPU) -> Tensor:
    """Weights in float64; the scales of batch norm are of one sign, of both, or partly zero."""
    theta = net.init(torch.Generator().manual_seed(0)).double()
    theta = theta + 0.1 * normal(theta.numel(), seed=1)
    parts = net.layout.unflatten(theta)
    for i in range(4):
        gamma = parts[f"blocks.{i}.norm.weight"]
        gamma.abs_()
        if gammas != "positive":
            gamma[:: 1 if gammas == "negative" else 3] *= -1
        if gammas == "zero":
            gamma[i : i + 3] = 0
    return theta.to(device)


def draw_tasks(
    shape: tuple[int, int, int], *, shot: int = 1, tasks: int = 1, soft: bool = False, device: torch.device = CPU
) -> Task:
    support, query = normal(tasks, shot * WAY, *shape, seed=6), normal(tasks, 3 * WAY, *shape, seed=3)
    if soft:
        targets = [normal(tasks, n, WAY, seed=n).softmax(-1) for n in (shot * WAY, 3 * WAY)]
    else:
        targets = [torch.arange(WAY).repeat(n).expand(tasks, -1) for n in (shot, 3)]
    return Task(*(part.to(device) for part in (support, targets[0], query, targets[1])))


def by_autograd(monkeypatch: pytest.MonkeyPatch, net: Net, theta: Tensor, tasks: Task, **given: Any) -> MetaGradient:
    with monkeypatch.context() as patch:
        patch.setattr(inner_loop, "by_hand", lambda *args: None)
        return meta_gradient(net, theta, tasks, batched=False, **given)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check(found: MetaGradient, expected: MetaGradient, bound: float) -> None:
    assert relative(found.grad, expected.grad) < bound
    torch.testing.assert_close(found[1:], expected[1:], rtol=bound, atol=bound)


@CASES
def test_the_meta_gradient_is_that_of_autograd(monkeypatch, arch, shape, shot):
    net, given = Net(arch, shape, WAY), {"lr": 0.01, "steps": 2}
    theta, tasks = weights(net), draw_tasks(shape, shot=shot)
    expected = by_autograd(monkeypatch, net, theta, tasks, **given)
    check(meta_gradient(net, theta, tasks, batched=False, **given), expected, 1e-10)
    rough = Task(*(part.float() if part.is_floating_point() else part for part in tasks))
    found = meta_gradient(net, theta.float(), rough, batched=False, **given)
    assert found.grad.dtype == torch.float32
    check(MetaGradient(*(part.double() for part in found)), expected, 1e-4)


@GAMMAS
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("arch", ["conv4", "conv4-adaptive"])
def test_any_sign_of_gamma_and_any_targets(monkeypatch, arch, soft, gammas):
    net, given = Net(arch, (3, 17, 16), WAY), {"lr": 0.1, "steps": 3}
    theta, tasks = weights(net, gammas), draw_tasks(net.shape, shot=3, tasks=2, soft=soft)
    found = meta_gradient(net, theta, tasks, batched=False, **given)
    check(found, by_autograd(monkeypatch, net, theta, tasks, **given), 1e-10)
    for name, part in net.layout.unflatten(found.grad[0]).items():
        assert bool(part.any()) != name.endswith("conv.bias"), name


def test_equal_values_in_a_window_pass_the_gradient_to_the_first(monkeypatch):
    net, given = Net("conv4", (1, 16, 16), WAY), {"lr": 0.1, "steps": 2}
    theta, tasks = weights(net), draw_tasks(net.shape, shot=2)
    for images in (tasks.support, tasks.query):
        images[..., 6:, :] = 0.5  # patches of one value: all windows tie there
    expected = by_autograd(monkeypatch, net, theta, tasks, **given)
    check(meta_gradient(net, theta, tasks, batched=False, **given), expected, 1e-10)


def by_definition(net: Net, theta: Tensor, task: Task, lr: float, steps: int) -> Tensor:
    """Weights after SGD on the mean of -sum(target log softmax), step by step."""
    targets = task.support_y if task.support_y.dim() == 2 else F.one_hot(task.support_y, WAY)
    for _ in range(steps):
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            loss = -(targets * net(leaf, task.support)[:, :WAY].log_softmax(1)).sum(1).mean()
            theta = theta - lr * torch.autograd.grad(loss, leaf)[0]
    return theta


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_meta_gradient_is_the_slope_of_the_query_loss(device, steps, soft):
    net, lr = Net("conv4", (3, 16, 16), WAY), 0.3
    theta, tasks = weights(net, device=device), draw_tasks(net.shape, device=device, shot=2, soft=soft)
    task = Task(*(part[0] for part in tasks))
    found = meta_gradient(net, theta, tasks, lr=lr, steps=steps, batched=False)
    direction = normal(theta.numel(), seed=4, device=device) / theta.numel() ** 0.5

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(net(by_definition(net, w, task, lr, steps), task.query), task.query_y)

    assert float(found.loss) == pytest.approx(float(loss(theta)), rel=1e-12)
    assert float(found.grad[0] @ direction) == pytest.approx(slope(loss, theta, direction, eps=1e-6), rel=1e-6)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("outputs", [WAY, WAY + 2])
def test_adaptation_takes_the_steps_of_its_definition(device, outputs, soft):
    net = Net("conv4", (3, 16, 16), outputs)
    theta, tasks = weights(net, device=device), draw_tasks(net.shape, device=device, shot=2, soft=soft)
    task = Task(*(part[0] for part in tasks))
    found = adapted(net, theta, task.support, task.support_y, head="maml", lr=0.3, steps=3, grad_of=plain_grad, way=WAY)
    assert relative(found - theta, by_definition(net, theta, task, 0.3, 3) - theta) < 1e-10
    assert not found.requires_grad


def test_learners_beside_one_another_do_not_touch():
    net = Net("conv4", (3, 16, 16), 3)
    theta = torch.stack([weights(net, gammas) for gammas in ("positive", "negative", "zero")])
    images, targets = normal(3, 6, 3, 16, 16, seed=5), normal(3, 6, 3, seed=6).softmax(-1)
    passes = Conv4Passes(net)
    together = passes.adapt(theta, images, targets, lr=0.2, steps=2)
    trace = passes.forward(together, lay(images))
    stats = passes.stats(together, trace)
    for t in range(3):
        alone = passes.adapt(theta[t : t + 1], images[t : t + 1], targets[t : t + 1], lr=0.2, steps=2)
        torch.testing.assert_close(together[t], alone[0], rtol=1e-9, atol=1e-12)
        found = (trace.logits[t], stats[t])
        torch.testing.assert_close(found, net.with_stats(alone[0], images[t]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("head", ["maml", "anil", "protonet"])
@pytest.mark.parametrize("shot", [1, inner_loop.SMALL])
def test_supports_that_adapt_together_adapt_as_alone(device, head, shot):
    net, labels = Net("conv4", (1, 16, 16), 3), torch.arange(WAY, device=device).repeat(shot)
    theta, supports = weights(net, device=device), normal(GROUP + 2, WAY * shot, 1, 16, 16, seed=5, device=device)
    given: dict[str, Any] = {"head": head, "lr": 0.1, "steps": 2, "way": WAY}
    found = list(adapted_each(net, theta, supports, labels, **given))
    assert len(found) == len(supports)
    for phi, support in zip(found, supports, strict=True):
        alone = adapted(net, theta, support, labels, grad_of=plain_grad, **given)
        torch.testing.assert_close(phi, alone, rtol=1e-9, atol=1e-12)


def test_bits_depend_on_the_place_in_a_group_alone():
    net, labels = Net("conv4", (3, 32, 32), 5), torch.arange(5)
    theta, supports = weights(net).float(), normal(2 * GROUP + 1, 5, 3, 32, 32, seed=5).float()
    given: dict[str, Any] = {"head": "maml", "lr": 0.1, "steps": 2}
    found = list(adapted_each(net, theta, supports, labels, **given))
    for start, stop in ((0, 1), (0, 3), (GROUP, 2 * GROUP), (GROUP, 2 * GROUP + 1), (2 * GROUP, 2 * GROUP + 1)):
        for again, before in zip(
            adapted_each(net, theta, supports[start:stop], labels, **given), found[start:stop], strict=True
        ):
            assert torch.equal(again, before)


def test_patch_statistics_are_those_of_zero_padded_patches():
    images = 3.0 + normal(2, 4, 2, 5, 6)
    found = lay(images, channels=4).patches
    assert found is not None
    for t in range(2):
        patches = F.unfold(images[t], 3, padding=1).transpose(1, 2).reshape(-1, 18)
        torch.testing.assert_close(found.mean[t], patches.mean(0))
        torch.testing.assert_close(found.cov[t], torch.cov(patches.T, correction=0))


def test_only_what_is_covered_is_done_by_hand():
    net = Net("conv4", (1, 16, 16), WAY)
    theta = weights(net)
    assert by_hand(net, theta, "maml") is not None
    for head in ("anil", "protonet"):
        assert by_hand(net, theta, head) is None
    assert by_hand(net, theta, "maml", net.initial_stats()) is None
    assert by_hand(net, theta.to("meta"), "maml") is None
    mlp = Net("mlp", (1, 16, 16), WAY)
    assert by_hand(mlp, mlp.init(torch.Generator()), "maml") is None


def test_an_adaptation_to_be_differentiated_is_not_done_by_hand(device):
    net, tasks = Net("conv4", (1, 16, 16), WAY), draw_tasks((1, 16, 16), device=device)
    support = tasks.support[0].requires_grad_()
    given: dict[str, Any] = {"head": "maml", "lr": 0.3, "steps": 2}
    theta = weights(net, device=device).requires_grad_()
    phi = adapted(net, theta, support, tasks.support_y[0], grad_of=graph_grad, **given)
    assert all(bool(part.any()) for part in torch.autograd.grad(phi.square().sum(), (support, theta)))
    plain = adapted(net, theta.detach(), support.detach(), tasks.support_y[0], grad_of=plain_grad, **given)
    torch.testing.assert_close(plain, phi.detach())
