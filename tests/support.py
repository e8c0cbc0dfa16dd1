"""Shared by the tests: a shard without a cluster, small worlds, and numerical derivatives."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from ray_dfml import evaluate
from ray_dfml.core import seeds
from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.core.inner_loop import Head
from ray_dfml.core.net import Net
from ray_dfml.errors import RejectedError
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import State, World
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.free import method as free
from ray_dfml.methods.icfil import IcfilConfig
from ray_dfml.methods.ideal.config import Config as IdealConfig
from ray_dfml.methods.purer import method as purer
from ray_dfml.methods.shared_answers import config as shared_answers
from ray_dfml.ops import OPS
from ray_dfml.types import Access, Arrays, ImageSpec, Job, TeacherCard

torch.set_num_threads(1)

CPU = torch.device("cpu")
GPU = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # the first product of a thread says so
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # `vmap` looped over an operation
]
"""Marks of a test that runs on an accelerator."""

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)
"""Settings of a property test: few examples, the same ones on every machine."""


@dataclass
class FakeTeacher:
    """A teacher with random weights, and the batch-norm statistics these weights give to uniform noise."""

    card: TeacherCard
    net: Net
    theta: Tensor
    stats: Tensor

    def double(self) -> "FakeTeacher":
        """The same teacher in float64."""
        return FakeTeacher(self.card, self.net, self.theta.double(), self.stats.double())


@dataclass
class FakeService:
    """A teacher that is only asked, in this process. `asked` counts the images of all calls."""

    card: TeacherCard
    teacher: FakeTeacher
    asked: int = 0

    def query(self, images: np.ndarray) -> np.ndarray:
        """See `types.Service.query`; nothing is remembered, so the same image counts again."""
        self.asked += len(images)
        pixels = to_pixels(images) if images.dtype == np.uint8 else torch.tensor(images)
        mean, std = (torch.tensor(values) for values in (self.card.image.mean, self.card.image.std))
        with torch.no_grad():
            logits = self.teacher.net(self.teacher.theta, normalise(pixels, mean, std), self.teacher.stats)
        if self.card.access == "label":
            return logits.argmax(-1).numpy()
        return (logits.softmax(-1) if self.card.access == "probs" else logits).numpy()


class FakeShard:
    """A shard process without the process: teachers drawn from their names. `sent` logs the work."""

    def __init__(self, world: World, *, batched: bool = False, device: torch.device = CPU) -> None:
        self.device, self.batched = device, batched
        self.teachers = {card.id: random_teacher(card, device) for card in world.cards}
        self.services: dict[str, FakeService] = {}
        self.sent: list[tuple[str, list[Job]]] = []

    def service(self, id: str) -> FakeService:
        """The teacher of that name as one that is only asked; the same object on every call."""
        return self.services.setdefault(id, FakeService(self.teachers[id].card, self.teacher(id)))

    def teacher(self, id: str) -> FakeTeacher:
        """The teacher of that name; the same object on every call. Raises RejectedError where there is none."""
        if id not in self.teachers:
            raise RejectedError(f"{id}: unreadable")
        return self.teachers[id]

    def send(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """`Backend.map` in this process, without the jobs of rejected teachers."""
        self.sent.append((op, list(jobs)))
        return [result for result in OPS[op](self, jobs, shared) if "rejected" not in result]

    def spoil(self, id: str) -> None:
        """Make the weights of a teacher unusable."""
        teacher = self.teachers[id]
        self.teachers[id] = replace(teacher, theta=torch.full_like(teacher.theta, float("nan")))


def play(
    name: str, cfg: Any, world: World, *, rounds: int = 1, first: int = 1, shard: FakeShard | None = None,
    device: torch.device = CPU,
) -> tuple[State, State, dict[str, Any]]:  # fmt: skip
    """The state before and after `rounds` rounds of a method in this process, and the last metrics.

    Shards, unless `shard` is given, and the learner's own work are on `device`."""
    shard, method, world = shard or FakeShard(world, device=device), METHODS[name], at(world, device)
    state = before = method.init(cfg, world)
    metrics: dict[str, Any] = {}
    for r in range(first, first + rounds):
        jobs = method.plan(cfg, world, state, r)
        results = shard.send(f"{name}.recover", jobs, method.shared(cfg, world, state, r)) if jobs else []
        state, metrics = method.learn(cfg, world, state, r, results, shard.send)
    return before, state, metrics


def at(world: World, device: torch.device) -> World:
    """The world whose learner works on a device."""
    return replace(world, device=str(device))


def alike(a: Any, b: Any, device: torch.device) -> bool:
    """Whether two results of the same work are `same`; on an accelerator, whose sums have no fixed order, whether they
    differ by rounding and by what optimisers make of it: 2 percent in norm, and half a level of a byte on average."""
    if device.type == "cpu":
        return same(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[key], b[key], device) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(alike(one, other, device) for one, other in zip(a, b, strict=True))
    one, other = (np.asarray(x.cpu() if isinstance(x, Tensor) else x) for x in (a, b))
    if one.shape != other.shape or one.dtype != other.dtype or one.dtype.kind not in "fu":
        return bool(np.array_equal(one, other))
    error = one.astype(float) - other.astype(float)
    if one.dtype.kind == "u":
        return bool(np.abs(error).mean() < 0.5)
    return bool(np.linalg.norm(error) <= 0.02 * np.linalg.norm(other) + 1e-7)


def rounding(device: torch.device) -> dict[str, float]:
    """Tolerances of `assert_close` for float32 numbers of a device against those of the CPU; on it, the usual ones."""
    return {} if device.type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(one, other) for one, other in zip(a, b, strict=True))
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def random_teacher(card: TeacherCard, device: torch.device = CPU) -> FakeTeacher:
    """Weights and statistics drawn from the card's name; the same numbers on every device."""
    network = Net(card.arch, card.image.shape, len(card.classes))
    rng = seeds.rng("fake teacher", card.id)
    theta = network.init(rng)
    _, stats = network.with_stats(theta, torch.rand(32, *card.image.shape, generator=rng) * 2 - 1)
    return FakeTeacher(card, network, theta.to(device), stats.to(device))


def image_spec(channels: int = 3, size: int = 16) -> ImageSpec:
    """Small images, normalised to about [-2, 2]."""
    return ImageSpec(channels=channels, height=size, width=size, mean=(0.5,) * channels, std=(0.25,) * channels)


def card(i: int, *, channels: int = 3, way: int = 2, arch: str = "conv4", size: int = 16) -> TeacherCard:
    """Card number `i`: consecutive classes of seven, so that neighbours overlap."""
    names = tuple(f"toy/{(i + local) % 7}" for local in range(way))
    return TeacherCard(id=f"{arch}-{i}", arch=arch, image=image_spec(channels, size), classes=names)


def small_world(*, cards: int = 3, channels: int = 3, way: int = 2, seed: int = 0, arch: str = "conv4") -> World:
    """A pool of random teachers of 16x16 images, and a Conv4 learner."""
    pool = tuple(card(i, channels=channels, way=way, arch=arch) for i in range(cards))
    return World(cards=pool, arch="conv4", image=image_spec(channels), way=way, seed=seed)


def small_config(**changes: Any) -> free.Config:
    """FREE in seconds: few images, a narrow generator, short replay."""
    small: dict[str, Any] = {
        "warmup": 1,
        "teachers_per_round": 2,
        "steps": 2,
        "images_per_class": 4,
        "latent": 8,
        "width": 4,
        "replay": {"shot": 1, "query": 2, "tasks": 2, "inner_steps": 1, "patience": 1, "max_updates": 2},
    }
    return free.Config.model_validate(small | changes)


def small_purer(**changes: Any) -> purer.Config:
    """PURER in seconds: few images and updates, no curriculum unless `curriculum_after` is brought forward."""
    small: dict[str, Any] = {
        "image_steps": 2,
        "updates": 2,
        "image_warmup": 1,
        "images_per_class": 4,
        "meta": {"shot": 1, "query": 2, "tasks": 2, "inner_steps": 1},
    }
    return purer.Config.model_validate(small | changes)


def small_bidf(**changes: Any) -> bidf.Config:
    """BiDf-MKD in seconds: few images, short inversions, three updates in a round."""
    small: dict[str, Any] = {
        "teachers_per_round": 2,
        "iterations": 3,
        "images_per_class": 4,
        "latent": 8,
        "width": 4,
        "inner_steps": 2,
        "generate_every": 3,
        "replay": {"shot": 1, "query": 2, "tasks": 3, "inner_steps": 1},
    }
    return bidf.Config.model_validate(small | changes)


def small_ideal(**changes: Any) -> IdealConfig:
    """IDEAL in seconds: a few batches of eight images, a narrow generator, few steps."""
    small: dict[str, Any] = {
        "budget": 40,
        "batch": 8,
        "first": 8,
        "images": ("generator",),
        "student": "conv4",
        "student_batch": 4,
        "steps": 1.0,
        "last_steps": 2,
        "latent": 8,
        "width": 4,
        "generator_steps": 2,
    }
    return IdealConfig.model_validate(small | changes)


def small_shared_answers(**changes: Any) -> shared_answers.Config:
    """`shared-answers` in less than a second: three batches, the last of which is cut, and two rounds of training."""
    small: dict[str, Any] = {
        "budget": 20,
        "batch": 8,
        "images": ("shapes", "dip"),
        "steps": 3,
        "fits": 2,
        "minibatch": 6,
    }
    return shared_answers.Config.model_validate(small | changes)


def small_distiller(name: str, **changes: Any) -> Any:
    """One of the older methods of distillation in seconds."""
    small: dict[str, Any] = {
        "batch": 8,
        "budget": 96 if name != "zsdb3" else 300,
        "student": "conv4",
        "width": 4,
        "latent": 4,
        "student_steps": 2,
        "iterations": 2,
        "generator_steps": 2 if name != "dfme" else 1,
        "candidates": 2,
        "directions": 2,
        "replays": 1.0,
        "last_steps": 2,
        "student_batch": 4,
    }
    config = METHODS[name].Config
    return config.model_validate({k: v for k, v in (small | changes).items() if k in config.model_fields})


def mixed_world(way: int = 2) -> World:
    """A grey teacher of 16x16 images, and a wider one of 20x20 colour images that knows three classes, one of them the
    grey one's. The learner takes 20x20 colour images. Each has a normalisation of its own."""
    grey = ImageSpec(channels=1, height=16, width=16, mean=(0.3,), std=(0.5,))
    colour = ImageSpec(channels=3, height=20, width=20, mean=(0.5, 0.4, 0.6), std=(0.25, 0.2, 0.3))
    pool = (
        TeacherCard(id="grey", arch="conv4", image=grey, classes=("toy/b", "toy/a")),
        TeacherCard(id="colour", arch="conv4-64", image=colour, classes=("toy/d", "toy/a", "toy/c")),
    )
    return World(cards=pool, arch="conv4", image=image_spec(3, 20), way=way, seed=0)


def only_asked(world: World, *levels: Access) -> World:
    """The world whose teachers give the levels of access, in turn."""
    cards = [replace(card, access=levels[i % len(levels)]) for i, card in enumerate(world.cards)]
    return replace(world, cards=tuple(cards))


def unique_images(n: int, shape: tuple[int, int, int], first: int = 0) -> np.ndarray:
    """uint8 images [n c h w] that carry their number, `first` + position, in the first two pixels."""
    images = np.zeros((n, *shape), np.uint8)
    numbers = np.arange(first, first + n)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers // 256, numbers % 256
    return images


def image_numbers(images: np.ndarray) -> list[int]:
    """The numbers written by `unique_images`."""
    return (images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]).tolist()


def random_bank(classes: int, per_class: int, shape: tuple[int, int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """A bank of noise images."""
    rng = np.random.default_rng(seed)
    return {f"toy/{i}": rng.integers(0, 256, (per_class, *shape), dtype=np.uint8) for i in range(classes)}


def normal(*shape: int, seed: int = 0, device: torch.device = CPU) -> Tensor:
    """Standard normal numbers in float64; the same ones on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def slope(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, eps: float = 1e-3) -> float:
    """Derivative of `f` at `x` along `direction`, by central differences of fourth order: error O(eps^4)."""
    with torch.no_grad():
        near = f(x + eps * direction) - f(x - eps * direction)
        far = f(x + 2 * eps * direction) - f(x - 2 * eps * direction)
    return float((8 * near - far) / (12 * eps))


@contextlib.contextmanager
def double_by_default() -> Iterator[None]:
    """New tensors are float64 inside. Build networks outside: they are cached for the whole process."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def finetune(
    network: Net,
    theta: Tensor,
    stats: Tensor,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    *,
    steps: int,
    lr: float,
    bn: evaluate.BatchNormMode,
    head: Head = "maml",
    icfil: IcfilConfig = evaluate.OFF,
    seed: int = 0,
) -> Tensor:
    """Logits [u k] of a query after the adaptation to a support (`adapt_to`).

    Images are normalised [n c h w], and labels [s] are in 0..k-1.
    """
    phi = evaluate.adapt_to(
        network, theta, stats, support, labels, steps=steps, lr=lr, bn=bn, head=head, icfil=icfil, seed=seed
    )
    return evaluate.query_logits(network, phi, stats, support, query, bn=bn)[:, : int(labels.max()) + 1]
