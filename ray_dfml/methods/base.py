"""What a method is: one module of functions over values. Nothing is inherited; `METHODS` lists the modules.

A round is `plan` -> (shards) `recover` -> `learn`, and `learn` may send more work to the shards through the same verb:

    jobs = method.plan(cfg, world, state, r)
    results = send("<method>.recover", jobs, method.shared(cfg, world, state, r))
    state, metrics = method.learn(cfg, world, state, r, results, send)

State is a nested dict of tensors, NumPy arrays, numbers and strings: it is what a checkpoint holds, and all of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ray_dfml.core import seeds
from ray_dfml.core.inner_loop import Head
from ray_dfml.core.net import Net, net
from ray_dfml.types import Arrays, ImageSpec, Job, TeacherCard

State = dict[str, Any]
Metrics = dict[str, float | int | None]
Send = Callable[[str, Sequence[Job], Arrays], list[Arrays]]
"""`Backend.map`: (op, jobs, shared) -> results in job order."""


class Teacher(Protocol):
    """A pool member as an op sees it, frozen, on the worker's device."""

    @property
    def card(self) -> TeacherCard:
        """What is known of it."""
        ...

    @property
    def net(self) -> Net:
        """Its network."""
        ...

    @property
    def theta(self) -> Tensor:
        """Its weights [p]."""
        ...

    @property
    def stats(self) -> Tensor:
        """Its running batch-norm statistics [k]."""
        ...


class Worker(Protocol):
    """What an op may ask of the process it runs in."""

    device: torch.device
    batched: bool
    """Whether to batch jobs with `vmap` (accelerators) or to loop over them (CPU)."""

    def teacher(self, id: str) -> Teacher:
        """The teacher, from a cache keyed by content."""
        ...


@dataclass(frozen=True, kw_only=True)
class World:
    """What every method knows: the pool's cards, the learner's shape, the seed; real images only for the ceiling.

    `image` is the learner's input. Teachers may have others: images are brought from one to the other by
    `core.images.fit` in pixel space.
    """

    cards: tuple[TeacherCard, ...]
    arch: str
    image: ImageSpec
    way: int
    seed: int
    head: Head = "maml"
    """How the learner adapts."""
    real: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Class name -> uint8 images [n c h w]; empty for every data-free method."""

    @property
    def net(self) -> Net:
        """The learner's network."""
        return net(self.arch, self.image.shape, self.way)


class MethodConfig(BaseModel):
    """Fields every method has. Unknown keys are errors; values cannot change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(default=1, ge=1, description="Outer iterations.")


class MetaConfig(BaseModel):
    """Meta-updates of the learner on tasks of N classes of a store of images ([Finn2017])."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shot: int = Field(default=5, ge=1, description="Support images per class of a task.")
    query: int = Field(default=15, ge=1, description="Query images per class of a task.")
    tasks: int = Field(default=10, ge=1, description="Tasks per meta-update.")
    inner_steps: int = Field(default=5, ge=0, description="SGD steps on the support.")
    inner_lr: float = Field(default=0.01, gt=0, description="Their step size.")
    lr: float = Field(default=1e-3, gt=0, description="Adam step size of the meta-update.")
    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="Over the tasks of an update; the released code sums."
    )
    mix_data: bool = Field(
        default=False, description="Whether a task may hold classes of several data sets; else all are of one."
    )


class ReplayConfig(MetaConfig):
    """Meta-updates on interpolated tasks of the memory bank, in bouts that end at a plateau ([Wei2024] section 4.2)."""

    patience: int = Field(
        default=10, ge=1, description="Stop after this many updates without a new best training accuracy."
    )
    max_updates: int = Field(default=50, ge=1, description="Stop after this many updates in any case.")


class Method(Protocol):
    """The shape of a method module. A type checker reads it; nothing inherits it."""

    @property
    def Config(self) -> type[MethodConfig]:
        """Its settings."""
        ...

    @property
    def READINGS(self) -> tuple[str, ...]:
        """Ways to read predictions from the final weights: `finetune`, `direct`, `assign` (see `ray_dfml.evaluate`)."""
        ...

    def notes(self, cfg: Any, world: World) -> list[str]:
        """What a reader must know of this method on this pool, such as a term that does not apply; one line each."""
        ...

    def init(self, cfg: Any, world: World) -> State:
        """State before the first round."""
        ...

    def plan(self, cfg: Any, world: World, state: State, r: int) -> list[Job]:
        """What round `r` needs of which teachers."""
        ...

    def shared(self, cfg: Any, world: World, state: State, r: int) -> Arrays:
        """Values that all recover jobs of round `r` read."""
        ...

    def recover(self, worker: Worker, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """On a shard: recovered tasks (and whatever else the round needs) of teachers."""
        ...

    def learn(
        self, cfg: Any, world: World, state: State, r: int, results: list[Arrays], send: Send
    ) -> tuple[State, Metrics]:
        """At the learner: the new state and the numbers of the round."""
        ...


def stacked(function: Callable[..., Any], *parts: Tensor, batched: bool) -> Any:
    """`function` on every row of stacked tensors, through `vmap` or one after another; results stacked alike."""
    if batched:
        return torch.func.vmap(function)(*parts)
    rows = [function(*row) for row in zip(*parts, strict=True)]
    if isinstance(rows[0], tuple):
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return torch.stack(rows)


def initial_learner(world: World, *, zero_head_bias: bool = False) -> State:
    """Fresh weights and batch-norm statistics of the learner, from the run's seed."""
    theta = world.net.init(seeds.generator(world.seed, "theta"), zero_head_bias=zero_head_bias)
    return {"theta": theta, "stats": world.net.initial_stats()}


def teacher_job(card: TeacherCard, *, index: int, seed: int, values: Arrays) -> Job:
    """A job on a teacher, with what it costs: shards take work by cost, not by count."""
    network = net(card.arch, card.image.shape, len(card.classes))
    memory = 4 * (network.layout.numel + network.stats_layout.numel)
    return Job(index=index, seed=seed, teacher=card.id, values=values, cost=float(network.macs), memory=memory)


def learner_image(world: World, state: Mapping[str, Any]) -> ImageSpec:
    """What the state's weights take: the world's images, normalised as the weights want it if the state says how."""
    if "mean" not in state:
        return world.image
    mean, std = (tuple(torch.as_tensor(state[key]).tolist()) for key in ("mean", "std"))
    return replace(world.image, mean=mean, std=std)


def image_values(image: ImageSpec) -> Arrays:
    """Shape and normalisation of an image spec as shippable values."""
    return {"shape": image.shape, "mean": np.array(image.mean, np.float32), "std": np.array(image.std, np.float32)}
