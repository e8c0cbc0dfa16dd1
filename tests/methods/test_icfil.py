"""ICFIL: what inversion, contrast and head training change, and what they leave alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ray_dfml.core import episodes, losses
from ray_dfml.core.inner_loop import adapted, plain_grad
from ray_dfml.core.net import Net
from ray_dfml.methods import icfil
from ray_dfml.methods.icfil import IcfilConfig, calibrate, inversion_loss, invert
from tests.support import normal, slope

NETWORK = Net("conv4", (3, 16, 16), 4)
WAY = 3


def config(**changes: Any) -> IcfilConfig:
    return IcfilConfig.model_validate({"steps": 3, "images": 2, "inversion_steps": 4} | changes)


def weights(device: torch.device) -> Tensor:
    return (
        NETWORK.init(torch.Generator().manual_seed(0)).to(device)
        + 0.01 * normal(NETWORK.layout.numel, device=device).float()
    )


def support(device: torch.device, shot: int = 2) -> tuple[Tensor, Tensor]:
    """Noise around another mean for each of three classes, of the four that the network tells apart."""
    labels = episodes.interleaved(WAY, shot).to(device)
    means = normal(WAY, 3, 1, 1, seed=5, device=device)
    return (means[labels] + 0.3 * normal(len(labels), 3, 16, 16, device=device)).float(), labels


def run(device: torch.device, cfg: IcfilConfig, phi: Tensor | None = None, **changes: Any) -> Tensor:
    """Calibrated weights of the small learner."""
    shot = changes.pop("shot", 2)
    given: dict[str, Any] = {"stats": None, "head": "maml", "seed": 7} | changes
    images, labels = support(device, shot)
    return calibrate(
        cfg, NETWORK, weights(device) if phi is None else phi, given.pop("stats"), images, labels, **given
    )  # fmt: skip


@pytest.fixture
def contrasts(monkeypatch) -> list[tuple[Tensor, ...]]:
    """(features, labels, domain) of every contrastive loss, as it is computed."""
    seen: list[tuple[Tensor, ...]] = []

    def spy(*parts: Tensor, temperature: float) -> Tensor:
        seen.append(tuple(part.detach() for part in parts))
        return losses.supervised_contrastive(*parts, temperature=temperature)

    monkeypatch.setattr(icfil, "losses", type("Spied", (), vars(losses) | {"supervised_contrastive": spy}))
    return seen


def test_without_contrastive_steps_nothing_happens(device):
    phi = weights(device)
    assert IcfilConfig().steps == 0
    assert run(device, config(steps=0, head="fresh"), phi) is phi
    assert run(device, IcfilConfig(), phi) is phi


def test_the_inversion_loss_is_the_sum_of_its_terms(device):
    phi, (images, labels) = weights(device).double(), support(device, 3)
    images = images.double()
    cfg = config(tv_weight=0.3, l2_weight=0.2, bn_weight=0.1)
    stats = NETWORK.with_stats(phi, normal(9, 3, 16, 16, seed=2, device=device))[1]
    logits, found = NETWORK.with_stats(phi, images, stats)
    expected = torch.nn.functional.cross_entropy(logits[:, :WAY], labels)
    expected = expected + 0.3 * losses.variation_norms(images) + 0.2 * images.square().sum().sqrt()
    for a, b in zip(*(NETWORK.stats_layout.unflatten(s).values() for s in (found, stats)), strict=True):
        expected = expected + 0.1 * (a - b).square().sum().sqrt()
    torch.testing.assert_close(inversion_loss(cfg, NETWORK, phi, stats, images, labels), expected)
    without = cfg.model_copy(update={"bn_weight": 0.0})
    assert inversion_loss(without, NETWORK, phi, stats, images, labels) < expected - 0.1


def test_inversion_reduces_its_loss_and_a_network_takes_the_images_for_their_class(device):
    phi, (images, _) = weights(device), support(device)
    stats, labels = NETWORK.with_stats(phi, images)[1], episodes.interleaved(WAY, 4).to(device)
    rng = torch.Generator().manual_seed(3)
    start, end = (
        invert(config(inversion_steps=steps), NETWORK, phi, stats, labels, rng.manual_seed(3)) for steps in (0, 40)
    )
    assert torch.equal(start, torch.randn(12, 3, 16, 16, generator=rng.manual_seed(3)).to(device))
    before, after = (float(inversion_loss(config(), NETWORK, phi, stats, x, labels)) for x in (start, end))
    assert after < 0.5 * before
    assert (NETWORK(phi, end, stats)[:, :WAY].argmax(1) == labels).all()
    assert end.abs().max() > 3  # nothing clamps it


def test_the_first_image_step_follows_the_gradient_through_a_cyclic_shift(device):
    """Adam's first step is image_lr against the sign of the gradient, at the images shifted by the drawn offsets."""
    phi, labels = weights(device).double(), episodes.interleaved(WAY, 2).to(device)
    stats = NETWORK.with_stats(phi, normal(9, 3, 16, 16, seed=2, device=device))[1]
    rng = torch.Generator().manual_seed(3)
    start = torch.randn(6, 3, 16, 16, generator=rng).to(device).double()
    at = torch.randint(-2, 3, (2,), generator=rng).tolist()
    assert at != [0, 0]
    moved = invert(config(inversion_steps=1), NETWORK, phi, stats, labels, torch.Generator().manual_seed(3))

    def loss(x: Tensor) -> Tensor:
        return inversion_loss(config(), NETWORK, phi, stats, x.roll(at, (2, 3)), labels)

    expected = start - 0.25 * plain_grad(loss)(start).sign()
    assert ((moved - expected).abs() < 1e-3).double().mean() > 0.99


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shot", [1, 3])
def test_every_image_has_a_positive_and_domains_are_batches_of_their_own(device, contrasts, shot, given):
    phi, (images, y) = weights(device), support(device, shot)
    stats = NETWORK.initial_stats().to(device) if given else None
    run(device, config(images=1, steps=2), phi, shot=shot, stats=stats)
    assert len(contrasts) == 2
    features, labels, domain = contrasts[0]
    assert labels.tolist() == [*y.tolist(), 0, 1, 2]
    assert domain.tolist() == [0] * len(y) + [1] * WAY
    positive = (labels[:, None] == labels) & (domain[:, None] != domain)
    assert (positive.sum(1) >= 1).all()
    fixed = stats if given else NETWORK.with_stats(phi, images)[1]
    made = invert(config(images=1), NETWORK, phi, fixed, labels[-WAY:], torch.Generator().manual_seed(7))
    torch.testing.assert_close(features[: len(y)], NETWORK.features(phi, images, stats))
    torch.testing.assert_close(features[len(y) :], NETWORK.features(phi, made, stats))


def test_contrastive_steps_move_the_backbone_downhill_and_leave_the_head(device, contrasts):
    phi = weights(device)
    one, many = (run(device, config(steps=steps, head_steps=0), phi) for steps in (1, 20))
    images, _ = support(device)
    for new in (one, many):
        assert torch.equal(NETWORK.split(new)[1], NETWORK.split(phi)[1])
        assert not torch.equal(NETWORK.split(new)[0], NETWORK.split(phi)[0])
    first, last = (losses.supervised_contrastive(*contrasts[i]) for i in (1, -1))
    assert last < first
    made = invert(
        config(), NETWORK, phi, NETWORK.with_stats(phi, images)[1], episodes.interleaved(WAY, 2).to(device),
        torch.Generator().manual_seed(7),
    )  # fmt: skip
    step = (one - phi).double()

    def contrast(w: Tensor) -> Tensor:
        features = torch.cat([NETWORK.features(w, x.double()) for x in (images, made)])
        return losses.supervised_contrastive(features, *contrasts[0][1:])

    found = slope(contrast, phi.double(), step / step.norm(), 1e-5)
    assert found == pytest.approx(-float(step.norm()) / 0.01, rel=1e-3)  # the step is -lr times the gradient


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("start", ["keep", "fresh"])
def test_head_steps_train_the_head_on_the_support_and_leave_the_backbone(device, start, given):
    phi, (images, labels) = weights(device), support(device)
    stats = NETWORK.initial_stats().to(device) if given else None
    before, after = (run(device, config(head=start, head_steps=steps), phi, stats=stats) for steps in (0, 25))
    assert torch.equal(NETWORK.split(before)[0], NETWORK.split(after)[0])
    assert torch.equal(NETWORK.split(before)[1], NETWORK.split(phi)[1]) == (start == "keep")
    expected = adapted(
        NETWORK, before, images, labels, head="anil", lr=0.01, steps=25, grad_of=plain_grad, stats=stats, way=WAY
    )
    assert torch.equal(after, expected)
    ce = [torch.nn.functional.cross_entropy(NETWORK(w, images, stats)[:, :WAY], labels) for w in (before, after)]
    assert ce[1] < ce[0]


def test_a_protonet_gets_the_means_of_the_calibrated_features(device):
    images, labels = support(device)
    phi = adapted(NETWORK, weights(device), images, labels, head="protonet", lr=1.0, steps=0, grad_of=plain_grad)
    new = run(device, config(), phi, head="protonet")
    assert not torch.equal(NETWORK.split(new)[0], NETWORK.split(phi)[0])
    features = NETWORK.features(new, images)
    means = torch.stack([features[labels == c].mean(0) for c in range(WAY)])
    torch.testing.assert_close(NETWORK.layout.unflatten(new)["head.weight"][:WAY], 2 * means)


def test_bits_follow_the_seed_and_nothing_is_changed_in_place(device):
    phi = weights(device)
    assert torch.equal(run(device, config(), phi), run(device, config(), phi))
    assert not torch.equal(run(device, config(), phi), run(device, config(), phi, seed=8))
    assert torch.equal(phi, weights(device))
