"""What images may carry the answers of services to a learner: trials on validation episodes of Omniglot.

Usage: python benchmarks/no_weights_images.py hold SPEC POOL RUN [--images strokes,joined] [--steps 900] [--agreement]
       python benchmarks/no_weights_images.py joint SPEC POOL RUN [--lr 0.001] [--steps 600] [--target logprobs]
       python benchmarks/no_weights_images.py climb SPEC POOL RUN [--own 0.5] [--updates 100]

POOL holds teachers with weights, which are only asked here: the answers are those that services of probabilities would
give. RUN is a run of `no-pool`, whose learner is the start. All images are dark on light, strokes are magnified as by
the preset `no-pool-characters`, and `joined` are two of these over one another.

`hold` trains the learner's features to hold the joined answers to images of sources: a linear layer for each teacher
reads its probabilities from them, and is thrown away at the end. With `--agreement` it also prints how often these
layers agree with their teachers: on real images of a teacher's own classes, and on validation images; and what their
joined answers, and the features below them, tell of new classes (nearest class mean). There batch norm has the
statistics of batches of real images, as in a transductive test.

`joint` does this and, in the same steps, trains the learner on tasks of `no-pool`. With `--target logprobs` the layers
learn log-probabilities, each with mean 0, by squared error.

`climb` breeds images of each class of each teacher: of strokes and their mutants those live on to which the teacher
gives the class with most certainty. The learner is then meta-trained on tasks of these, or in part of `no-pool`'s.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from no_weights import LEAST, SHOTS, accuracy, logits_of, nearest, row, validation
from torch import Tensor

from ray_dfml.config import resolve
from ray_dfml.core import optim
from ray_dfml.core.images import normalise, to_bytes, to_pixels
from ray_dfml.core.scoring import mean_ci95
from ray_dfml.core.sources import SOURCES
from ray_dfml.core.sources.warp import Warp, warp, zoom
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.learner import Learner
from ray_dfml.methods import no_pool
from ray_dfml.runtime.shard import Shard
from ray_dfml.types import LearnerWeights

MIX = {"strokes": 3000, "joined": 1500, "shapes": 1500, "dipw": 1500, "dip": 1500, "dipc": 1000}
"""Images of each source, if `--images` does not say."""
ELITE, BRED = 20, 250
"""Images of a class that live on, and new ones of a generation and teacher."""
CONTROL: no_pool.Config = no_pool.Config.model_validate(
    resolve("no-pool", preset="no-pool-characters").method.model_dump()
)


def opened(given: argparse.Namespace) -> tuple[LearnerWeights, Pool, torch.Generator]:
    """The learner to start from, the pool, and the generator of all draws."""
    return Learner.load(given.run).weights, Pool.open(given.pool), torch.Generator().manual_seed(given.seed)


def drawn(rng: torch.Generator, name: str, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Images [n c h w] of a source, dark on light, or `joined`."""
    if name == "joined":
        bend = Warp(rotation=0.35, scale=0.2, shear=0.15, shift=0.12, elastic=0.08)
        other = warp(rng, drawn(rng, "strokes", count, shape), bend, fill="edge")
        return torch.minimum(drawn(rng, "strokes", count, shape), other)
    found = SOURCES[name].function(rng, count, shape)
    return 1 - (zoom(rng, found, CONTROL.zoom_low, CONTROL.zoom_high) if name == "strokes" else found)


def mixed(rng: torch.Generator, images: str, count: int, shape: tuple[int, int, int]) -> Tensor:
    """So many images of sources in equal parts, or of `MIX` in its proportions."""
    names = images.split(",") if images else list(MIX)
    shares = [1 / len(names)] * len(names) if images else [MIX[name] / sum(MIX.values()) for name in names]
    parts = [drawn(rng, name, round(count * share), shape) for name, share in zip(names, shares, strict=True)]
    return to_pixels(to_bytes(torch.cat(parts)))


class Reader:
    """A learner whose features are read by one linear head for each teacher, in training."""

    def __init__(self, weights: LearnerWeights, heads: int, classes: int, rng: torch.Generator) -> None:
        self.weights, self.net, self.shape = weights, weights.net, (heads, classes)
        self.mean, self.std = torch.tensor(weights.image.mean), torch.tensor(weights.image.std)
        size = self.net.features(weights.theta, torch.zeros(2, *weights.image.shape)).shape[1]
        read = torch.randn(heads * classes, size, generator=rng) / size**0.5
        self.parts = [weights.theta.clone(), read, torch.zeros(heads * classes)]
        self.adams = [optim.Adam.zeros(part) for part in self.parts]

    def features(self, theta: Tensor, pixels: Tensor) -> Tensor:
        """Features [n d] of pixels, with the batch's statistics."""
        return self.net.features(theta, normalise(pixels, self.mean, self.std), first_order=True)

    def answers(self, parts: list[Tensor], pixels: Tensor) -> Tensor:
        """Logits [n t q] of all heads."""
        return F.linear(self.features(parts[0], pixels), *parts[1:]).unflatten(1, self.shape)

    def step(self, parts: list[Tensor], loss: Tensor, lr: float) -> None:
        """An Adam step; that of the heads is three times as long."""
        grads = torch.autograd.grad(loss, parts, materialize_grads=True)
        for i, grad in enumerate(grads):
            self.parts[i], self.adams[i] = optim.adam_step(
                self.parts[i], grad, self.adams[i], lr=lr if i == 0 else 3 * lr
            )

    def leaves(self) -> list[Tensor]:
        """The weights as leaves of a graph."""
        return [part.detach().requires_grad_() for part in self.parts]

    def of_real(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n d] and logits [n t q] of real images, in batches of 250 drawn at random."""
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = torch.cat([self.features(self.parts[0], x) for x in pixels[order].split(250)])[order.argsort()]
            return found, F.linear(found, *self.parts[1:]).unflatten(1, self.shape)


def slope(step: int, steps: int) -> float:
    """The share of the step size: a short rise, then half a cosine."""
    return min(1, (step + 1) / 30) * 0.5 * (1 + np.cos(np.pi * step / steps))


def own_images(spec: str, pool: Pool) -> list[Tensor]:
    """The real images of each teacher's classes."""
    data, found = datasets.load(spec), []
    names = [name.removeprefix("omniglot/") for name in data.class_names]
    for card in pool.cards:
        known = [names.index(name.removeprefix("omniglot/")) for name in card.classes]
        found.append(to_pixels(np.ascontiguousarray(data.images[np.flatnonzero(np.isin(data.labels, known))])))
    return found


def hold(given: argparse.Namespace) -> None:
    """Train the learner on the answers alone, and print its accuracy before and after."""
    weights, pool, rng = opened(given)
    x = mixed(rng, given.images, given.queries, weights.image.shape)
    wished = logits_of(pool, x).softmax(2)
    one = Reader(weights, *wished.shape[1:], rng)
    for step in range(given.steps):
        rows, parts = torch.randint(0, len(x), (128,), generator=rng), one.leaves()
        loss = -(wished[rows] * one.answers(parts, x[rows]).log_softmax(2)).sum(2).mean()
        one.step(parts, loss, given.lr * slope(step, given.steps))
    compare(given, one)
    if given.agreement:
        agreement(given.spec, pool, one)


def agreement(spec: str, pool: Pool, one: Reader) -> None:
    """Print how the heads agree with their teachers, and what their joined answers tell of new classes."""
    sets, data = own_images(spec, pool), validation(spec)
    taught, found = logits_of(pool, torch.cat(sets)).argmax(2), one.of_real(torch.cat(sets))[1].argmax(2)
    of = torch.arange(len(sets)).repeat_interleave(torch.tensor([len(images) for images in sets]))
    own = (found == taught)[torch.arange(len(of)), of].float().mean()
    real = to_pixels(data.images)
    features, answers = one.of_real(real)
    agrees = (answers.argmax(2) == logits_of(pool, real).argmax(2)).float().mean()
    print(f"agreement: own classes {100 * own:.1f} %, validation images {100 * agrees:.1f} %")
    joined = answers.log_softmax(2).clamp_min(np.log(LEAST)).flatten(1)
    for name, vectors in (("joined answers", joined), ("features", features)):
        cells = ["{:.1f} ± {:.1f}".format(*mean_ci95(nearest(vectors, data.labels, shot, 200))) for shot in SHOTS]
        print(f"| {name} | {' | '.join(cells)} |")


def task_loss(one: Reader, theta: Tensor, bank: list[np.ndarray], rng: torch.Generator) -> Tensor:
    """The loss of prototypes on a 5-way task of 1 + 15 images of a class."""
    picks = torch.randperm(len(bank), generator=rng)[:5].tolist()
    own = [bank[i][torch.randperm(len(bank[i]), generator=rng)[:16].numpy()] for i in picks]
    images = to_pixels(np.stack(own).reshape(-1, *own[0].shape[1:])).unflatten(0, (5, 16))
    support, query = (one.features(theta, part.flatten(0, 1)) for part in (images[:, :1], images[:, 1:]))
    return F.cross_entropy(-torch.cdist(query, support).square(), torch.arange(5).repeat_interleave(15))


def control_bank(rng: torch.Generator, shape: tuple[int, int, int]) -> list[np.ndarray]:
    """Classes as `no-pool` makes them."""
    return list(no_pool.classes(CONTROL.model_copy(update={"classes": 60}), shape, rng).values())


def joint(given: argparse.Namespace) -> None:
    """Train the learner on the answers and on tasks of `no-pool`, and print its accuracy before and after."""
    weights, pool, rng = (
        Learner.load(given.run).weights,
        Pool.open(given.pool),
        torch.Generator().manual_seed(given.seed),
    )
    x = mixed(rng, given.images, given.queries, weights.image.shape)
    logits = logits_of(pool, x)
    soft = logits.log_softmax(2).clamp_min(np.log(LEAST))
    soft = soft - soft.mean(2, keepdim=True)
    soft = (soft - soft.mean(0)) / soft.std((0, 2), keepdim=True)
    one, bank = Reader(weights, *logits.shape[1:], rng), list[np.ndarray]()
    for step in range(given.steps):
        bank = control_bank(rng, weights.image.shape) if step % 10 == 0 else bank
        rows, parts = torch.randint(0, len(x), (128,), generator=rng), one.leaves()
        found = one.answers(parts, x[rows])
        if given.target == "soft":
            held = -(logits[rows].softmax(2) * found.log_softmax(2)).sum(2).mean()
        else:
            held = (found - found.mean(2, keepdim=True) - soft[rows]).square().mean()
        tasks = torch.stack([task_loss(one, parts[0], bank, rng) for _ in range(2)]).mean()
        one.step(parts, held + tasks, given.lr * slope(step, given.steps))
    compare(given, one)


def bred(pool: Pool, first: Tensor, generations: int, rng: torch.Generator) -> list[np.ndarray]:
    """For each class of each teacher the uint8 images [ELITE c h w] that it is surest of, among strokes and mutants."""
    shard, bank, sure = Shard(lambda id: (pool.entry(id).inside, *pool.load(id))), list[np.ndarray](), list[float]()
    for card in pool.cards:

        def said_of(pixels: Tensor, id: str = card.id) -> Tensor:
            teacher = shard.teacher(id)
            mean, std = (torch.tensor(values) for values in (teacher.card.image.mean, teacher.card.image.std))
            with torch.no_grad():
                return teacher.net(teacher.theta, normalise(pixels, mean, std), teacher.stats).log_softmax(1)

        images, labels = 1 - first, torch.arange(len(card.classes)).repeat_interleave(ELITE)  # light on dark
        said = said_of(first)
        for _ in range(generations):
            parents = images[torch.cat([column.topk(ELITE).indices for column in said.T])]
            new = SOURCES["mutants"].function(rng, BRED, parents, labels)
            images, said = torch.cat([images, new]), torch.cat([said, said_of(1 - new)])
        for column in said.T:
            best = column.topk(ELITE)
            bank.append(to_bytes(1 - images[best.indices]))
            sure.append(float(best.values.mean().exp()))
    print(
        f"{len(first) + generations * BRED} queries a teacher; probability of the class, geometric mean of its images:"
    )
    print(f"mean over classes {np.mean(sure):.3f}, least {min(sure):.3f}")
    return bank


def climb(given: argparse.Namespace) -> None:
    """Meta-train the learner on images that climbed to the classes of the teachers, and print its accuracy."""
    weights, pool, rng = (
        Learner.load(given.run).weights,
        Pool.open(given.pool),
        torch.Generator().manual_seed(given.seed),
    )
    bank = bred(pool, drawn(rng, "strokes", 1000, weights.image.shape), given.generations, rng)
    one, own = Reader(weights, 1, 1, rng), list[np.ndarray]()
    for update in range(given.updates):
        own = control_bank(rng, weights.image.shape) if update % 10 == 0 else own
        parts = one.leaves()
        losses = [task_loss(one, parts[0], own if t < 4 * given.own else bank, rng) for t in range(4)]
        one.step(parts, torch.stack(losses).mean(), given.lr)
    compare(given, one)


def compare(given: argparse.Namespace, one: Reader) -> None:
    """Print a row for the start and one for the learner."""
    data, now = validation(given.spec), replace(one.weights, theta=one.parts[0].detach())
    first, last = (
        {shot: accuracy(of, data, shot, given.episodes) for shot in SHOTS} for of in (one.weights, now)
    )  # fmt: skip
    print("| learner | 1-shot | over the start | 5-shot | over the start |\n|---|---|---|---|---|")
    print(row("start", first, first))
    print(row(given.kind, last, first))


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser()
    kinds = parser.add_subparsers(dest="kind", required=True)
    held, jointly, climbed = (kinds.add_parser(name) for name in ("hold", "joint", "climb"))
    for one in (held, jointly, climbed):
        for name in ("spec", "pool", "run"):
            one.add_argument(name, type=str if name == "spec" else Path)
        one.add_argument("--seed", type=int, default=1)
        one.add_argument("--episodes", type=int, default=300)
    for one, lr, steps in ((held, 3e-3, 900), (jointly, 1e-3, 600)):
        one.add_argument("--images", default="")
        one.add_argument("--queries", type=int, default=10_000)
        one.add_argument("--lr", type=float, default=lr)
        one.add_argument("--steps", type=int, default=steps)
    held.add_argument("--agreement", action="store_true")
    jointly.add_argument("--target", default="logprobs", choices=("logprobs", "soft"))
    climbed.add_argument("--own", type=float, default=0.0)
    climbed.add_argument("--generations", type=int, default=8)
    climbed.add_argument("--updates", type=int, default=100)
    climbed.add_argument("--lr", type=float, default=1e-3)
    given = parser.parse_args()
    {"hold": hold, "joint": joint, "climb": climb}[given.kind](given)


if __name__ == "__main__":
    main()
