"""The finetune reading by head, batch norm and calibration, and the evaluate op around it."""

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml import evaluate
from ray_dfml.core import episodes, seeds
from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.core.net import Net
from ray_dfml.evaluate import EvalConfig, adapt_to, query_logits
from ray_dfml.methods.icfil import IcfilConfig, calibrate
from ray_dfml.types import LearnerWeights
from tests.support import FakeShard, finetune, image_spec, normal, small_world

NETWORK, WAY, LR, STEPS = Net("conv4", (3, 16, 16), 4), 3, 0.05, 4
HEADS = pytest.mark.parametrize("head", ["maml", "anil", "protonet"])
BN = pytest.mark.parametrize("bn", ["transductive", "support", "running"])
SMALL = IcfilConfig(steps=2, images=2, inversion_steps=3, head_steps=2)


def drawn(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, statistics, support, labels and query in float64."""
    theta = NETWORK.init(torch.Generator().manual_seed(0)).to(device).double()
    theta = theta + 0.05 * normal(theta.numel(), seed=1, device=device)
    stats = NETWORK.with_stats(theta, normal(16, 3, 16, 16, seed=2, device=device))[1]
    labels = episodes.interleaved(WAY, 2).to(device)
    means = normal(WAY, 3, 1, 1, seed=3, device=device)
    support = means[labels] + normal(len(labels), 3, 16, 16, seed=4, device=device)
    query = means[episodes.interleaved(WAY, 5).to(device)] + normal(15, 3, 16, 16, seed=5, device=device)
    return theta, stats, support, labels, query


def by_definition(device: torch.device, head: str, bn: str) -> Tensor:
    """Probabilities [u k] of the query, each head and each batch norm written out."""
    theta, stats, support, labels, query = drawn(device)
    at_support = stats if bn == "running" else None
    for _ in range(0 if head == "protonet" else STEPS):
        leaf = theta.detach().requires_grad_()
        loss = F.cross_entropy(NETWORK(leaf, support, at_support)[:, :WAY], labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
        if head == "anil":
            gradient[: -NETWORK.ways * 33] = 0  # the head is 4 x 32 and 4
        theta = theta - LR * gradient
    at_query = {"transductive": None, "support": NETWORK.with_stats(theta, support)[1], "running": stats}[bn]
    if head == "protonet":
        known, asked = NETWORK.features(theta, support, at_support), NETWORK.features(theta, query, at_query)
        means = torch.stack([known[labels == c].mean(0) for c in range(WAY)])
        return (-torch.cdist(asked, means).square()).softmax(1)
    return NETWORK(theta, query, at_query)[:, :WAY].softmax(1)


@HEADS
@BN
def test_finetune_follows_its_definition(device, head, bn):
    given: dict[str, Any] = {"steps": STEPS, "lr": LR, "bn": bn, "head": head}
    found = finetune(NETWORK, *drawn(device), **given).softmax(1)
    torch.testing.assert_close(found, by_definition(device, head, bn))
    others = [
        by_definition(device, h, b)
        for h in ("maml", "anil", "protonet")
        for b in ("transductive", "support", "running")
    ]
    assert sum(bool(torch.allclose(found, other)) for other in others) == 1  # all nine differ
    calibrated = finetune(NETWORK, *drawn(device), **given, icfil=SMALL, seed=3).softmax(1)
    assert not torch.allclose(calibrated, found)
    off = finetune(NETWORK, *drawn(device), **given, icfil=IcfilConfig(head="fresh", head_steps=7), seed=3).softmax(1)
    assert torch.equal(off, found)


@HEADS
@BN
def test_calibration_comes_after_the_adaptation_and_with_its_batch_norm(device, head, bn):
    theta, stats, support, labels, query = drawn(device)
    given: dict[str, Any] = {"steps": STEPS, "lr": LR, "bn": bn, "head": head}
    phi = adapt_to(NETWORK, theta, stats, support, labels, **given)
    fixed = stats if bn == "running" else None
    expected = calibrate(SMALL, NETWORK, phi, fixed, support, labels, head=head, seed=3)
    new = adapt_to(NETWORK, theta, stats, support, labels, **given, icfil=SMALL, seed=3)
    assert torch.equal(new, expected)
    of_support = NETWORK.with_stats(new, support, first_order=True)[1]
    at_query = {"transductive": None, "support": of_support, "running": stats}[bn]
    logits = finetune(NETWORK, theta, stats, support, labels, query, **given, icfil=SMALL, seed=3)
    assert torch.equal(logits, NETWORK(new, query, at_query, first_order=True)[:, :WAY])


@HEADS
@BN
def test_a_learner_without_batch_norm_adapts_and_calibrates(device, head, bn):
    network = Net("mlp", (3, 16, 16), 4)
    theta, stats = (
        network.init(torch.Generator().manual_seed(0)).to(device).double(),
        network.initial_stats().to(device),
    )
    given: dict[str, Any] = {"steps": 1, "lr": LR, "bn": bn, "head": head}
    plain, calibrated = (
        finetune(network, theta, stats, *drawn(device)[2:], **given, icfil=i) for i in (evaluate.OFF, SMALL)
    )
    assert torch.isfinite(calibrated).all()
    assert not torch.allclose(plain, calibrated)


def test_no_query_enters_the_calibration(device, monkeypatch):
    theta, stats, support, labels, query = drawn(device)
    found = []

    def spy(*args: Any, **more: Any) -> Tensor:
        found.append(calibrate(*args, **more))
        return found[-1]

    monkeypatch.setattr(evaluate, "calibrate", spy)
    for q in (query, torch.full_like(query, float("nan"))):
        finetune(NETWORK, theta, stats, support, labels, q, steps=2, lr=LR, bn="support", icfil=SMALL, seed=3)
    assert torch.equal(*found)
    assert torch.isfinite(found[0]).all()
    assert not {name for f in (adapt_to, calibrate) for name in inspect.signature(f).parameters if "query" in name}


# ------------------------------------------------------------------------------------------------------------- the op

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 3, 16, 16), dtype=np.uint8)
LABELS = np.repeat(np.arange(6), 10)
SPEC = image_spec()


def accuracies(device: torch.device, cfg: EvalConfig, count: int, *, shot: int = 2, **changes: Any) -> np.ndarray:
    theta, stats, *_ = drawn(device)
    weights = LearnerWeights(
        arch="conv4",
        image=SPEC,
        outputs=4,
        theta=theta.float().cpu(),
        stats=stats.float().cpu(),
        head="maml",
        steps=STEPS,
        lr=LR,
    )
    weights = replace(weights, **changes)
    shared = evaluate.shared(cfg, weights, reading="finetune", images=IMAGES, labels=LABELS)
    jobs = evaluate.jobs(cfg, way=WAY, shot=shot, stop=count)
    results = evaluate.evaluate(FakeShard(small_world(cards=0), device=device), jobs, shared)
    return np.concatenate([result["accuracies"] for result in results])


@HEADS
@pytest.mark.parametrize("icfil", [IcfilConfig(), SMALL], ids=["plain", "icfil"])
def test_the_op_scores_each_episode_with_its_own_seed(device, head, icfil):
    cfg = EvalConfig(query=3, steps=STEPS, lr=9.0, seed=5, icfil=icfil)
    found = accuracies(device, cfg, 12, head=head)
    theta, stats, *_ = (part.float() for part in drawn(device))
    mean, std = torch.tensor(SPEC.mean, device=device), torch.tensor(SPEC.std, device=device)
    for i in (0, 11):
        episode = episodes.draw(LABELS, way=WAY, shot=2, query=3, seed=5, index=i)
        support, query = (normalise(to_pixels(IMAGES[rows], device=device), mean, std) for rows in episode[:2])
        logits = finetune(
            NETWORK, theta, stats, support, episodes.interleaved(WAY, 2).to(device), query, steps=STEPS, lr=LR,
            bn=cfg.bn, head=head, icfil=icfil, seed=seeds.derive(5, WAY, 2, 3, i, "icfil"),
        )  # fmt: skip
        right = logits.argmax(1) == episodes.interleaved(WAY, 3).to(device)
        assert found[i] == pytest.approx(100 * float(right.float().mean()))


@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_the_score_of_an_episode_does_not_depend_on_how_many_there_are(device, monkeypatch, bn, shot):
    """To the bit: the logits, of which accuracies show little."""
    found = []

    def spy(*args: Any, **more: Any) -> Tensor:
        found.append(query_logits(*args, **more))
        return found[-1]

    monkeypatch.setattr(evaluate, "query_logits", spy)
    cfg = EvalConfig(query=3, steps=STEPS, bn=bn)
    many = accuracies(device, cfg, 20, shot=shot)
    for count in (1, 4, 5, 13):
        before = found[:20]
        found.clear()
        assert np.array_equal(accuracies(device, cfg, count, shot=shot), many[:count])
        assert all(torch.equal(a, b) for a, b in zip(found, before[:count], strict=True))
        found[:] = before


def test_the_op_adapts_as_the_weights_say_not_as_the_settings(device):
    assert EvalConfig().lrs == (0.01, 0.05, 0.2, 0.5)
    with pytest.raises(ValueError, match="greater than 0"):
        EvalConfig(lrs=(0.1, 0.0))
    one, other = (
        accuracies(device, EvalConfig(query=3, **more), 5) for more in ({}, {"lr": 3.0, "steps": 1, "lrs": (7.0,)})
    )
    assert np.array_equal(one, other)
    assert not np.array_equal(one, accuracies(device, EvalConfig(query=3), 5, lr=3.0))


def test_jobs_cover_episodes_once_and_begin_at_tens():
    cfg = EvalConfig()
    found = [evaluate.jobs(cfg, way=2, shot=1, start=start, stop=stop) for start, stop in ((0, 20), (20, 45))]
    spans = [(job.values["start"], job.values["stop"]) for jobs in found for job in jobs]
    assert spans == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 45)]
    assert [[job.index for job in jobs] for jobs in found] == [[0, 1], [0, 1, 2]]
