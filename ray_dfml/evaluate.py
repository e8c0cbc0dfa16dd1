"""Meta-test: the `evaluate` op, which measures accuracy on fixed real episodes, and the jobs that cover the episodes.

[Wei2024] FREE, arXiv 2405.00984, section 5.1. [Finn2017] arXiv 1703.03400.

A learner adapts as its head says (`core.inner_loop.adapted`), and on request ICFIL follows (`methods.icfil`). There are
three modes of batch norm at test. `transductive` normalises support and query each with its own statistics, so the
images of a query help to classify each other; the published numbers of the field are of this kind. `support` normalises
the query with the statistics of the support. `running` uses the statistics kept from training for both.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ray_dfml.core import episodes, scoring, seeds
from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.core.inner_loop import Head, adapted, adapted_each, plain_grad
from ray_dfml.core.net import Net
from ray_dfml.methods.icfil import IcfilConfig, calibrate
from ray_dfml.types import Arrays, Job, LearnerWeights, Shard

BatchNormMode = Literal["transductive", "support", "running"]
EPISODES_PER_JOB = 10
"""A multiple of `inner_loop.GROUP`, so that the place of an episode in its group does not depend on their number."""
OFF = IcfilConfig()
"""Settings that switch the calibration off."""


class EvalConfig(BaseModel):
    """Settings of validation and test."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(default=0, ge=0, description="Rounds between validations; 0 chooses a twentieth of the rounds.")
    episodes: int = Field(default=600, ge=1, description="Test episodes.")
    val_episodes: int = Field(default=100, ge=1, description="Validation episodes, for selection.")
    shots: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1, 5), min_length=1, description="Support images per class of the test episodes."
    )
    query: int = Field(default=15, ge=1, description="Query images per class.")
    steps: int = Field(default=10, ge=0, description="Adaptation steps on the support.")
    lr: float = Field(default=0.01, gt=0, description="Step size of the adaptation if none is chosen from `lrs`.")
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.01, 0.05, 0.2, 0.5),
        description="Candidate step sizes: the best on validation episodes is used. If there are none, `lr` is used.",
    )
    bn: BatchNormMode = Field(
        default="transductive", description="Batch-norm statistics at test; every score names them."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the episodes; equal for every method.")
    test_best: bool = Field(
        default=False, description="Also report the best round on the test episodes, labelled as such."
    )
    icfil: IcfilConfig = IcfilConfig()


def adapt_to(
    network: Net,
    theta: Tensor,
    stats: Tensor,
    support: Tensor,
    labels: Tensor,
    *,
    steps: int,
    lr: float,
    bn: BatchNormMode,
    head: Head,
    icfil: IcfilConfig = OFF,
    seed: int = 0,
) -> Tensor:
    """Weights [p] after the adaptation to a support: normalised images [s c h w] and labels [s] in 0..k-1.

    Only the calibration reads `seed`.
    """
    fixed = stats if bn == "running" else None
    way = int(labels.max()) + 1
    phi = adapted(
        network, theta, support, labels, head=head, lr=lr, steps=steps, grad_of=plain_grad, stats=fixed, way=way
    )
    return calibrate(icfil, network, phi, fixed, support, labels, head=head, seed=seed)


@torch.no_grad()
def query_logits(
    network: Net, phi: Tensor, stats: Tensor, support: Tensor, query: Tensor, *, bn: BatchNormMode
) -> Tensor:
    """Logits [u q] of a query under adapted weights [p]. `stats` [k] are used only if `bn` is `running`."""
    fixed = stats if bn == "running" else None
    if bn == "support":
        fixed = network.with_stats(phi, support, first_order=True)[1]
    return network(phi, query, fixed, first_order=True)


def jobs(cfg: EvalConfig, *, way: int, shot: int, start: int = 0, stop: int) -> list[Job]:
    """Jobs that cover episodes start..stop-1, ten each, so that the work is cut alike for any number of shards.

    `start` must be a multiple of `EPISODES_PER_JOB`, so that jobs always cut the episodes at the same places.
    """
    values = {"way": way, "shot": shot, "query": cfg.query, "seed": cfg.seed}
    return [
        Job(index=i, seed=0, values=values | {"start": first, "stop": min(first + EPISODES_PER_JOB, stop)})
        for i, first in enumerate(range(start, stop, EPISODES_PER_JOB))
    ]


def shared(cfg: EvalConfig, weights: LearnerWeights, *, reading: str, images: Any, labels: np.ndarray) -> Arrays:
    """Values that all evaluate jobs read: the weights and how they adapt, the reading, images and labels [n].

    The images are uint8 [n c h w], or what `Backend.keep` made of them.
    """
    return {
        "weights": weights.values(),
        "reading": reading,
        "images": images,
        "labels": labels,
        "bn": cfg.bn,
        "icfil": cfg.icfil.model_dump(),
    }


def evaluate(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `evaluate` op: of the episodes of each job the accuracies in percent, and the ways `predicted` [e q].

    The reading `finetune` adapts to the support. `direct` takes output unit c for way c and ignores the support.
    `assign` matches output units to ways by the support's log-probabilities. The last two use the running statistics of
    the weights in batch norm.
    """
    device, weights = shard.device, LearnerWeights.of(shared["weights"])
    weights = replace(weights, theta=weights.theta.to(device), stats=weights.stats.to(device))
    mean, std = (torch.tensor(values, device=device) for values in (weights.image.mean, weights.image.std))

    def load(positions: np.ndarray) -> Tensor:
        return normalise(to_pixels(shared["images"][positions], device), mean, std)

    out = []
    for job in jobs:
        v = job.values
        indices, asked = range(v["start"], v["stop"]), {name: v[name] for name in ("way", "shot", "query", "seed")}
        drawn = [episodes.draw(shared["labels"], index=index, **asked) for index in indices]
        labels, wanted = (episodes.interleaved(v["way"], v[name]).to(device) for name in ("shot", "query"))
        supports = torch.stack([load(episode.support) for episode in drawn])
        queries = (load(episode.query) for episode in drawn)
        if shared["reading"] == "finetune":
            at = [seeds.derive(v["seed"], v["way"], v["shot"], v["query"], index, "icfil") for index in indices]
            icfil = IcfilConfig.model_validate(shared["icfil"])
            answers = _finetuned(weights, supports, labels, queries, bn=shared["bn"], icfil=icfil, seeds=at)
        else:
            answers = _read(weights, supports, labels, queries, assign=shared["reading"] == "assign")
        predicted = [logits.argmax(-1) for logits in answers]
        found = [100.0 * float((ways == wanted).float().mean()) for ways in predicted]
        out.append({"accuracies": np.array(found), "predicted": torch.stack(predicted).cpu().numpy()})
    return out


def _finetuned(
    weights: LearnerWeights, supports: Tensor, labels: Tensor, queries: Iterable[Tensor],
    *, bn: BatchNormMode, icfil: IcfilConfig, seeds: Sequence[int],
) -> Iterator[Tensor]:  # fmt: skip
    """Query logits of each episode, as `finetune` gives them. Supports adapt together where that is faster."""
    network, fixed, way = weights.net, weights.stats if bn == "running" else None, int(labels.max()) + 1
    phis = adapted_each(
        network, weights.theta, supports, labels,
        head=weights.head, lr=weights.lr, steps=weights.steps, stats=fixed, way=way,
    )  # fmt: skip
    for phi, support, query, seed in zip(phis, supports, queries, seeds, strict=True):
        calibrated = calibrate(icfil, network, phi, fixed, support, labels, head=weights.head, seed=seed)
        yield query_logits(network, calibrated, weights.stats, support, query, bn=bn)[:, :way]


@torch.no_grad()
def _read(
    weights: LearnerWeights, supports: Tensor, labels: Tensor, queries: Iterable[Tensor], *, assign: bool
) -> Iterator[Tensor]:
    """Query logits of each episode without adaptation. With `assign` the support decides which unit is which way."""
    network, theta, stats = weights.net, weights.theta, weights.stats
    for support, query in zip(supports, queries, strict=True):
        logits = network(theta, query, stats, first_order=True)
        if assign:
            on_support = network(theta, support, stats, first_order=True).log_softmax(-1).cpu().numpy()
            units = scoring.assign_units(on_support, labels.cpu().numpy(), int(labels.max()) + 1)
            logits = logits[:, torch.tensor(units, device=logits.device)]
        yield logits
