"""Gradients and learners from answers alone.

Usage: python benchmarks/zero_order.py cosine POOL [--images 24] [--mu 0.05] [--central]
       python benchmarks/zero_order.py learner SPEC POOL [--access probs] [--queries 1000000] [--set method.x=y]...

`cosine` compares zero-order estimates with the gradient that autograd finds, for the cross-entropy of each teacher of a
pool on images of the source dip, and with the closed form sqrt(q / (d + q - 1)).

`learner` trains BiDf-MKD on a pool whose teachers are only asked, round by round until one more would ask more images
in all than `--queries`. A row has the accuracy on 200 validation episodes, 5-way, steps of 0.2, of the learner, and the
first one that of the same network untrained. One process, one thread; the preset characters-bidf.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.config import resolve
from ray_dfml.core import zero_order
from ray_dfml.core.answers import answers
from ray_dfml.core.scoring import mean_ci95
from ray_dfml.core.sources import SOURCES
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.evaluate import EvalConfig
from ray_dfml.methods.base import State, World, learner_weights
from ray_dfml.methods.bidf import asked
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.inversion import as_teacher_sees
from ray_dfml.runtime.local import LocalBackend
from ray_dfml.runtime.shard import HostedTeacher, Shard
from ray_dfml.scorer import Episodes, Part, accuracies
from ray_dfml.types import Access, Arrays, Job, Labelled, TeacherCard

DIRECTIONS = (1, 5, 20, 100)
EVERY = 250_000
"""Images asked about between two rows of `learner`."""


class Counted:
    """A teacher that is only asked. `count` is the number of images it was asked about."""

    def __init__(self, teacher: HostedTeacher, access: Access) -> None:
        self.card, self._teacher, self.count = replace(teacher.card, access=access), teacher, 0

    def query(self, images: np.ndarray) -> np.ndarray:
        """See `types.Service.query`."""
        self.count += len(images)
        pixels = torch.tensor(images).float() / (255 if images.dtype == np.uint8 else 1)
        with torch.no_grad():
            seen = as_teacher_sees(pixels, self.card.image)
            logits = self._teacher.net(self._teacher.theta, seen, self._teacher.stats, first_order=True)
        return answers(logits, self.card.access)


class Desk(Shard):
    """A shard whose teachers answer, and are counted."""

    access: Access = "probs"

    def __init__(self, pool: Pool) -> None:
        super().__init__(lambda id: (pool.entry(id).card, *pool.load(id)))
        self.services: dict[str, Counted] = {}

    def service(self, id: str) -> Counted:
        """See `types.Shard.service`."""
        if id not in self.services:
            self.services[id] = Counted(self.teacher(id), self.access)
        return self.services[id]

    @property
    def count(self) -> int:
        """Images asked about in all."""
        return sum(service.count for service in self.services.values())


def cosines(teacher: HostedTeacher, x: Tensor, directions: int, mu: float, *, central: bool) -> Tensor:
    """The cosine [n] of estimate and gradient of the cross-entropy at each of n images."""
    labels = torch.arange(len(x)) % len(teacher.card.classes)

    def loss(pixels: Tensor) -> Tensor:
        seen = as_teacher_sees(pixels, teacher.card.image)
        logits = teacher.net(teacher.theta, seen, teacher.stats, first_order=True)
        return F.cross_entropy(logits, labels.repeat(len(pixels) // len(x)), reduction="none")

    def ask(probes: Tensor) -> Tensor:
        with torch.no_grad():
            return loss(probes.flatten(0, 1)).unflatten(0, probes.shape[:2])

    leaf = x.clone().requires_grad_()
    (true,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    rng = torch.Generator().manual_seed(directions)
    found = zero_order.gradient(ask, x, rng=rng, directions=directions, mu=mu, central=central)[1]
    return F.cosine_similarity(found.flatten(1), true.flatten(1))


def compare(given: argparse.Namespace) -> None:
    """Print a row for each number of directions."""
    pool = Pool.open(given.pool)
    shard = Desk(pool)
    image = pool.cards[0].image
    size = image.channels * image.height * image.width
    x = 0.1 + 0.8 * SOURCES["dip"].function(torch.Generator().manual_seed(0), given.images, image.shape)
    print("| q | queries per image | cosine | standard error | closed form |\n|---|---|---|---|---|")
    for q in DIRECTIONS:
        each = [cosines(shard.teacher(c.id), x, q, given.mu, central=given.central) for c in pool.cards]
        found = torch.cat(each)
        print(
            f"| {q} | {zero_order.queries(1, q, central=given.central)} | {found.mean():.4f} | "
            f"{found.std() / len(found) ** 0.5:.4f} | {zero_order.cosine(size, q):.4f} |",
            flush=True,
        )


def accuracy(world: World, data: Labelled, state: State, shot: int) -> str:
    """Accuracy and interval of a learner on validation episodes."""
    weights = learner_weights(world, state, steps=10, lr=0.2)
    of = Episodes(weights=weights.digest, reading="finetune", data="validation", split="val", shot=shot, lr=0.2)
    part = Part(episodes=of, start=0, stop=200)
    found = accuracies(LocalBackend({}.__getitem__), EvalConfig(), weights, part, data, way=world.way)
    return "{:.2f} ± {:.2f}".format(*mean_ci95(found))


def train(given: argparse.Namespace) -> None:
    """Print the learner's accuracy against the images asked about."""
    pool, Desk.access = Pool.open(given.pool), given.access
    shard = Desk(pool)
    cards: tuple[TeacherCard, ...] = tuple(replace(card, access=given.access) for card in pool.cards)
    world = World(cards=cards, arch="conv4", image=cards[0].image, way=5, seed=given.seed)
    cfg: Any = resolve("bidf-mkd", preset="characters-bidf", settings=given.set).method
    part = datasets.load(given.spec).subset("val")
    data = Labelled("validation", "val", np.ascontiguousarray(part.images), part.labels)

    def send(op: str, jobs: Any, shared: Arrays) -> list[Arrays]:
        return [result for job in jobs for result in shard.run(op, [job], shared)]

    def row(state: State, metrics: Any) -> None:
        figures = [accuracy(world, data, state, shot) for shot in (1, 5)]
        known = metrics.get("recover/support_accuracy", metrics.get("recover/support_balance"))
        cells = [shard.count, state["updates"], "-" if known is None else f"{known:.0f}", *figures]
        print(f"| {' | '.join(map(str, cells))} | {time.process_time() - began:.0f} |", flush=True)

    began, state, metrics, r, due = time.process_time(), bidf.init(cfg, world), {}, 0, EVERY
    print(f"{2 * asked.set_queries(cfg, world.way)} queries a visit, {len(cards)} services of {given.access}")
    print("| queries | updates | support, % | 1-shot | 5-shot | seconds |\n|---|---|---|---|---|---|")
    row(state, {})
    while shard.count + cfg.teachers_per_round * 2 * asked.set_queries(cfg, world.way) <= given.queries:
        jobs: list[Job] = bidf.plan(cfg, world, state, r)
        results = send("bidf-mkd.recover", jobs, bidf.shared(cfg, world, state, r))
        state, metrics = bidf.learn(cfg, world, state, r, results, send)
        r += 1
        if shard.count >= due or r % 100 == 0:
            row(state, metrics)
            due = shard.count + EVERY
        if r == given.rounds:
            break
    row(state, metrics)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser()
    kinds = parser.add_subparsers(dest="kind", required=True)
    first = kinds.add_parser("cosine")
    first.add_argument("pool")
    first.add_argument("--images", type=int, default=24)
    first.add_argument("--mu", type=float, default=0.05)
    first.add_argument("--central", action="store_true")
    second = kinds.add_parser("learner")
    second.add_argument("spec")
    second.add_argument("pool")
    second.add_argument("--access", default="probs", choices=("logits", "probs", "label"))
    second.add_argument("--queries", type=int, default=1_000_000)
    second.add_argument("--rounds", type=int, default=0, help="Stop after so many rounds; 0: when queries are spent.")
    second.add_argument("--seed", type=int, default=0)
    second.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    compare(given) if given.kind == "cosine" else train(given)


if __name__ == "__main__":
    main()
