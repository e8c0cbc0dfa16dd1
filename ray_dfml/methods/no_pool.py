"""`no-pool`: the same learner, meta-trained on images that no teacher has seen. It is the control of a table.

A class is one image of an image source (`core.sources`), and its other images are warps of that one. What a method
gains over `no-pool`, its teachers have taught; what `no-pool` gains over `random`, any images would have.

[Finn2017] Model-Agnostic Meta-Learning, arXiv 1703.03400, Algorithm 1. Tasks of one image and its
changes: Khodadadeh et al. (UMTRA), arXiv 1811.11819.
"""

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ray_dfml.core import seeds
from ray_dfml.core.images import to_bytes
from ray_dfml.core.sources import SOURCES
from ray_dfml.core.sources.warp import Warp, recolour, warp, zoom
from ray_dfml.errors import UsageError, check_sources
from ray_dfml.methods import cost as cost_of
from ray_dfml.methods import panels, replay
from ray_dfml.methods.bank import Bank
from ray_dfml.methods.base import (
    Cost,
    MetaConfig,
    Method,
    MethodConfig,
    Metrics,
    Preset,
    Send,
    State,
    World,
    initial_learner,
)
from ray_dfml.methods.characters import REPLAY, STEP
from ray_dfml.types import LEVELS, Arrays, Shard

FIRST = tuple(name for name, source in SOURCES.items() if not source.parents)
"""The sources that need no earlier images."""

CLASSES_AT_ONCE = 25
"""Classes whose warps are made together."""


class Config(MethodConfig):
    """Number of meta-updates = `rounds` x `updates_per_round`; every round has new classes."""

    rounds: int = Field(default=100, ge=1, description="Outer iterations.")
    updates_per_round: int = Field(default=10, ge=1, description="Meta-updates in a round.")
    images: tuple[str, ...] = Field(
        default=("dip",), min_length=1, description=f"Image sources, in equal parts: {', '.join(FIRST)}."
    )
    classes: int = Field(default=150, ge=2, description="Images of the sources in a round; each is a class.")
    images_per_class: int = Field(default=20, ge=2, description="Warps of each of these images.")
    rotation: float = Field(default=0.35, ge=0, description="Largest rotation of a warp, in radians.")
    scale: float = Field(default=0.2, ge=0, description="Largest logarithm of its magnification.")
    shear: float = Field(default=0.15, ge=0, description="Largest shear.")
    shift: float = Field(default=0.12, ge=0, description="Largest shift, in half-widths.")
    elastic: float = Field(default=0.08, ge=0, description="Size of its random bending, in half-widths.")
    flip: Literal["auto", "on", "off"] = Field(
        default="auto", description="Mirror half of the warps: always, never, or in colour only."
    )
    recolour: float = Field(default=0.0, ge=0, description="Largest change of contrast, brightness, cast, saturation.")
    zoom_low: float = Field(default=1.0, gt=0, description="Smallest magnification of an image of the source.")
    zoom_high: float = Field(default=1.0, gt=0, description="Largest magnification of an image of the source.")
    invert: bool = Field(default=False, description="Whether dark and light of the sources change places.")
    replay: MetaConfig = MetaConfig()

    @field_validator("images")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_sources(names, FIRST)
        return names


def assumptions(cfg: Config) -> list[str]:
    """Lines that say what the images assume about the data."""
    said = [f"no-pool: tasks of images of {name}, which assumes {SOURCES[name].assumption}" for name in cfg.images]
    known = [
        *([f"zoomed by {cfg.zoom_low:g} to {cfg.zoom_high:g}"] if (cfg.zoom_low, cfg.zoom_high) != (1, 1) else []),
        *(["dark and light changed places"] if cfg.invert else []),
    ]
    if known:
        said.append(f"no-pool: images {', '.join(known)}: this is knowledge of the domain, which no teacher gave")
    return said


def notes(cfg: Config, world: World) -> list[str]:
    """Lines that say what the images assume about the data, and that the teachers are not used."""
    unused = "no-pool: the pool gives the learner's input and number of classes, and nothing else"
    return [*assumptions(cfg), *([unused] if world.cards else [])]


def init(cfg: Config, world: World) -> State:
    """The learner drawn from the run's seed, as in every method. Raises UsageError as `check` does."""
    check(cfg, world, "method")
    return replay.with_optimiser(initial_learner(world))


def check(cfg: Config, world: World, section: str) -> None:
    """Raise UsageError if no task can be drawn, for an empty range of zooms, and for images that no source can make.

    `section` is where the settings stand in the configuration.
    """
    needed = cfg.replay.shot + cfg.replay.query
    if cfg.images_per_class < needed:
        raise UsageError(
            f"no-pool: tasks take {cfg.replay.shot} + {cfg.replay.query} images of a class, "
            f"{section}.images_per_class is {cfg.images_per_class}; raise it"
        )
    if cfg.classes < world.way:
        raise UsageError(f"no-pool: a task takes {world.way} classes, {section}.classes is {cfg.classes}; raise it")
    if cfg.zoom_low > cfg.zoom_high:
        raise UsageError(
            f"no-pool: {section}.zoom_low is {cfg.zoom_low:g}, above {section}.zoom_high, {cfg.zoom_high:g}"
        )
    if min(world.image.shape[1:]) < 8:
        raise UsageError("no-pool: image sources need a height and a width of at least 8")


def classes(cfg: Config, shape: tuple[int, int, int], rng: torch.Generator) -> Bank:
    """The classes of a round: name -> uint8 warps [images_per_class c h w] of one image of the sources."""
    base = _base(cfg, shape, rng)
    mirror = cfg.flip == "on" or (cfg.flip == "auto" and shape[0] > 1)
    strength = Warp(
        rotation=cfg.rotation, scale=cfg.scale, shear=cfg.shear, shift=cfg.shift, elastic=cfg.elastic, mirror=mirror
    )
    bank: Bank = {}
    for some in base.split(CLASSES_AT_ONCE):
        found = warp(rng, some.repeat_interleave(cfg.images_per_class, 0), strength, fill="edge")
        if cfg.recolour:
            found = recolour(rng, found, cfg.recolour)
        for own in to_bytes(found).reshape(len(some), cfg.images_per_class, *shape):
            bank[f"{len(bank):06d}"] = own
    return bank


def _base(cfg: Config, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """The images [classes c h w] of which a round's classes are made. The first sources make those left over."""
    share, left = divmod(cfg.classes, len(cfg.images))
    parts = [SOURCES[name].function(rng, share + (i < left), shape) for i, name in enumerate(cfg.images)]
    base = torch.cat(parts)
    if (cfg.zoom_low, cfg.zoom_high) != (1, 1):
        base = zoom(rng, base, cfg.zoom_low, cfg.zoom_high)
    return 1 - base if cfg.invert else base


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """Draw the classes of the round, and make `updates_per_round` meta-updates on tasks of them."""
    bank = classes(cfg, world.image.shape, seeds.rng(world.seed, r, "images"))
    metrics: Metrics = {}
    for u in range(cfg.updates_per_round):
        state, metrics = replay.update(cfg.replay, world, state, bank, (r, "replay", u), send)
    return state, {f"replay/{name}": value for name, value in metrics.items()}


def cost(cfg: Config, world: World, shard: Shard) -> Cost:
    """The number of updates, and the time that it takes to draw the classes."""
    updates = cfg.rounds * cfg.updates_per_round
    drawing = cost_of.seconds(lambda: classes(cfg, world.image.shape, torch.Generator().manual_seed(0)))
    return Cost(recovery=cfg.rounds * drawing, least=updates, most=updates, meta=cfg.replay)


CHARACTERS: dict[str, Any] = {
    "rounds": 10,
    "images": ("strokes",),
    "zoom_low": 1.16,
    "zoom_high": 2.12,
    "invert": True,
    "replay": {**REPLAY, "lr": 3e-3},
}

COLOUR: dict[str, Any] = {
    "rounds": 10,
    "scale": 0.3,
    "shift": 0.2,
    "elastic": 0.05,
    "recolour": 0.3,
    "replay": {**REPLAY, "inner_lr": 0.05, "lr": 3e-3},
}

PRESETS: dict[str, Preset] = {
    "no-pool-characters": Preset(
        "28x28 characters: strokes, magnified until they fill the image, dark on light; zoom and polarity were chosen "
        "by a look at training characters",
        {"method": CHARACTERS, "eval": STEP},
    ),
    "no-pool-colour": Preset(
        "colour images: random convolutional networks, mirrored and with changed colours",
        {"method": COLOUR, "eval": {"lr": 0.05}},
    ),
}

METHOD = Method(
    Config=Config,
    init=init,
    learn=learn,
    notes=notes,
    cost=cost,
    panels=panels.LAST_UPDATE,
    shown={"replay/accuracy": "training"},
    presets=PRESETS,
    access=LEVELS,
    needs_pool=False,
    baseline=True,
)
