"""What a run reads before it starts: it checks pools and data, and derives the learner's shape from them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml.config import RunConfig
from ray_dfml.core import episodes
from ray_dfml.core.images import fit, to_bytes, to_pixels
from ray_dfml.data import datasets, weights_file
from ray_dfml.data.pool import Entry, Pool
from ray_dfml.data.services import Asked, Budget
from ray_dfml.errors import RejectedError, UsageError, first_of
from ray_dfml.evaluate import EvalConfig
from ray_dfml.files import Uri
from ray_dfml.methods import METHODS, start
from ray_dfml.methods.base import World, teacher_job
from ray_dfml.runtime import choice
from ray_dfml.runtime.accounts import Accounts
from ray_dfml.runtime.choice import Members
from ray_dfml.runtime.shard import Loaded
from ray_dfml.top1 import check_known
from ray_dfml.types import ImageSpec, Labelled, TeacherCard, size_text

DEFAULT_WAY = 5
"""Classes of an episode if there is neither a teacher nor a setting to say."""

CHECKED_BYTES = 4 << 30
"""Weights of the largest pool on a disk whose teachers are all checked before the run. It takes some seconds."""

FIT_IMAGES = 512
"""How many images are resized at once."""


class Teachers(Mapping[str, Loaded]):
    """The teachers of open pools whose weights are here, by id. None is kept in memory.

    Each access reads and checks the file of the teacher again. It raises RejectedError if the file has gone bad, and
    KeyError for an unknown id or a service.
    """

    def __init__(self, members: Members, spoiled: Mapping[str, int] | None = None) -> None:
        """`members` maps an id in this run to the entry in its pool, and to the pool; `spoiled` is as of `choice`."""
        self._spoiled = spoiled or {}
        self._members = {id: member for id, member in members.items() if member[0].api is None}

    def __getitem__(self, id: str) -> Loaded:
        entry, pool = self._members[id]
        found: Loaded = (replace(entry.inside, id=id), *pool.load(entry.id))
        return choice.shuffled(found, self._spoiled[id]) if id in self._spoiled else found

    def pool_of(self, id: str) -> Path | Uri:
        """Where the pool of a teacher is."""
        return self._members[id][1].path

    def __contains__(self, id: object) -> bool:
        return id in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


@dataclass(frozen=True)
class Inputs:
    """What a run has read: usable teachers, real images, rejected teachers with reasons, and notes for the reader."""

    world: World
    sets: list[Labelled]
    teachers: Teachers
    rejected: dict[str, str]
    pools: list[dict[str, Any]]
    data: list[dict[str, Any]]
    notes: list[str]
    state_bytes: int
    """Size of the state that the method begins with."""
    accounts: Accounts
    """Whom the run asks, and what it may spend."""

    def held_bytes(self) -> int:
        """How much the object store of this machine must hold at once: real images, and twice the state.

        The state counts twice, for what goes to the shards and for what comes back. Teachers are not held, since the
        shards of this machine read them from their pool.
        """
        real = sum(one.nbytes for one in self.world.real.values())
        return real + sum(one.images.nbytes for one in self.sets) + 2 * self.state_bytes


def read_inputs(config: RunConfig) -> Inputs:
    """Open pools and data, and check every teacher once.

    Raises RejectedError if no teacher is usable, and UsageError if pools, data, method and settings do not fit each
    other, if the key of a service that will be asked is missing, or if a budget is below one request to it.
    """
    _check_once(config.data)
    members, rejected, pools, later = _open(config)
    members, notes = choice.chosen(members, config.choice, config.seed)
    spoiled = choice.spoiled(members, config.choice, config.seed)
    if spoiled:
        notes.append(
            f"pool.fraction_poisoned: the weights of {len(spoiled)} teachers are shuffled: {first_of([*spoiled])}"
        )
    notes += [f"{place}: the weights of each teacher are checked when they are first needed" for place in later]
    cards = tuple(replace(entry.card, id=id) for id, (entry, _) in members.items())
    loaded = {spec: datasets.load(spec) for spec in config.data}
    if not members and not loaded:
        raise UsageError(f"{config.name}: name a pool with --pool, or data with --data")
    _check_different(loaded)
    image = learner_input(
        {card.id: card.image for card in cards} or {f"--data {spec}": _spec(loaded[spec]) for spec in loaded},
        unstated=[card.id for card in cards if card.access != "weights"],
    )
    way = _way(config, cards)
    _check_learner(config.learner.arch, image, way)
    sets: list[Labelled] = []
    real: dict[str, np.ndarray] = {}
    method = METHODS[config.name]
    for spec, one in loaded.items():
        notes += [f"--data {spec}: {note}" for note in one.notes]
        shapes = [image.shape] if method.students is None else list({card.image.shape: None for card in cards})
        notes += [resizing(spec, one.shape, shape) for shape in shapes if one.shape != shape]
        for split in ("val", "test"):
            part = one.subset(split)
            names = tuple(f"{one.name}/{name}" for name in part.class_names)
            if method.students is None:
                notes += _known(spec, split, set(names), cards)
                notes += small_classes(part, f"--data {spec}, split {split}", way, config.eval)
            for shape in shapes:
                images = fitted(part.images, shape, f"--data {spec}")
                sets.append(Labelled(one.identity, split, images, part.labels, names, shape))
    if method.students is not None:
        notes += check_known(cards, list({(one.data, one.split): one for one in sets}.values()))
    if config.eval.icfil.steps:
        notes.append("scores are with our ICFIL, a reconstruction; `adapt` and `evaluate` leave it out")
    if method.needs_real:
        if not loaded:
            raise UsageError(f"{config.name} trains on real images: name them with --data")
        for n, (spec, one) in enumerate(loaded.items()):
            part = one.subset("train")
            images = fitted(part.images, image.shape, f"--data {spec}")
            real |= {f"{one.name}-{n}/{c}": images[part.labels == i] for i, c in enumerate(part.class_names)}
    world = World(
        cards=cards, arch=config.learner.arch, image=image, way=way, seed=config.seed,
        head=config.learner.head, real=real,
    )  # fmt: skip
    state = method.init(config.method, world)  # a world that the method cannot take is refused here, in the driver
    start.check(config.learner.start, config.start, world)
    data = [
        {
            "spec": spec,
            "data": one.identity,
            "md5": one.source.get("md5") or one.source.get("pixels_md5"),
            "licence": one.source.get("licence"),
        }
        for spec, one in loaded.items()
    ]
    notes += method.notes(config.method, world) + start.notes(config.learner.start, config.start)
    accounts = _accounts(config, members, method.queries(config.method, world))
    accounts.check_keys()
    accounts.check_budgets()
    return Inputs(world, sets, Teachers(members, spoiled), rejected, pools, data, notes, _bytes(state), accounts)


def _check_learner(arch: str, image: ImageSpec, way: int) -> None:
    """Raise UsageError if the learner's architecture cannot take the learner's input."""
    try:
        weights_file.parts(arch, image, way)
    except RejectedError as error:
        raise UsageError(f"learner.arch: {error}") from None


def _check_once(specs: Sequence[str]) -> None:
    twice = [spec for n, spec in enumerate(specs) if spec in specs[:n]]
    if twice:
        raise UsageError(f"--data {twice[0]} is given twice; name it once")


def _check_different(loaded: Mapping[str, datasets.ImageSet]) -> None:
    """Raise UsageError if two specs name the same images, since their scores could not be told apart."""
    first: dict[str, str] = {}
    for spec, one in loaded.items():
        if one.identity in first:
            raise UsageError(f"--data {first[one.identity]} and --data {spec} are the same images; name one of them")
        first[one.identity] = spec


def _open(
    config: RunConfig,
) -> tuple[dict[str, tuple[Entry, Pool]], dict[str, str], list[dict[str, Any]], list[str]]:
    """The usable teachers of the run's pools, why the others were refused, and the pools as the manifest notes them.

    Last come the pools whose weights are checked by the shard that first needs them: those in an object store, and
    those of more than `CHECKED_BYTES`, which would take minutes and pass through this process.
    """
    members: dict[str, tuple[Entry, Pool]] = {}
    rejected: dict[str, str] = {}
    closed: list[str] = []
    later: list[str] = []
    pools, levels = [], METHODS[config.name].access
    for number, path in enumerate(config.pool):
        pool = Pool.open(path)
        pools.append({"path": path, "sha256": pool.sha256(), "teachers": len(pool.cards)})
        if isinstance(pool.path, Uri) or _weights_bytes(pool) > CHECKED_BYTES:
            later.append(path)
        for card in pool.cards:
            id = card.id if len(config.pool) == 1 else f"{number}:{card.id}"
            entry = pool.entry(card.id)
            try:
                if card.access not in levels:
                    closed.append(id)
                    raise RejectedError(f"gives {card.access}, and {config.name} takes {' or '.join(levels)}")
                if entry.api is None and path not in later:
                    pool.load(card.id)
                members[id] = (entry, pool)
            except RejectedError as error:
                rejected[id] = str(error)
    if config.pool and not members:
        if closed and len(closed) == len(rejected):
            raise UsageError(f"{closed[0]} {rejected[closed[0]]}; no other teacher in {', '.join(config.pool)} does")
        raise RejectedError(
            f"no usable teacher in {', '.join(config.pool)}: {next(iter(rejected.values()), 'it is empty')}"
        )
    return members, rejected, pools, later


def _weights_bytes(pool: Pool) -> int:
    """Bytes of the weights in a pool, by the architectures that its manifest names."""
    inside = [pool.entry(card.id) for card in pool.cards]
    return sum(teacher_job(one.inside, index=0, seed=0, values={}).memory for one in inside if one.api is None)


def _accounts(
    config: RunConfig, members: Mapping[str, tuple[Entry, Pool]], planned: Mapping[str, int]
) -> Accounts:  # fmt: skip
    """The accounts of a run. It asks the teachers that give no weights, and those that the method says it asks."""
    cfg = config.budget
    return Accounts(
        asked=[
            Asked(
                card=replace(entry.card, id=id), terms=entry.terms, api=entry.api, pool=str(pool.path),
                image=None if entry.api else entry.image,
            )
            for id, (entry, pool) in members.items() if entry.access != "weights" or id in planned
        ],
        run=Budget(queries=cfg.queries, money=cfg.money),
        each=Budget(queries=cfg.per_teacher),
        pools={str(pool.path): pool.budget for _, pool in members.values() if pool.budget is not None},
        planned=planned,
    )  # fmt: skip


def _bytes(value: Any) -> int:
    """Size of the tensors and arrays in a state."""
    if isinstance(value, dict):
        return sum(_bytes(item) for item in value.values())
    return getattr(value, "nbytes", 0)


def small_classes(part: datasets.ImageSet, what: str, way: int, cfg: EvalConfig) -> list[str]:
    """One line for each shot for whose episodes some classes of a split are too small. The lines begin with `what`.

    Raises UsageError, which names such classes, if too few classes are left.
    """
    notes = []
    for shot in cfg.shots:
        needed = shot + cfg.query
        usable = set(episodes.usable(part.labels, needed).tolist())
        small = [n for n in range(len(part.class_names)) if n not in usable]
        named = first_of([f"{part.class_names[n]} has {(part.labels == n).sum()}" for n in small])
        if len(usable) < way:
            raise UsageError(
                f"{what}: {way}-way {shot}-shot episodes need {way} classes with {needed} images ({shot} support, "
                f"{cfg.query} query), there are {len(usable)}{f'; {named}' if small else ''}; change eval.shots or "
                "eval.query, or the way"
            )
        if small:
            notes.append(
                f"{what}: {len(small)} of {len(part.class_names)} classes have fewer than the {needed} images of "
                f"{shot}-shot episodes and are left out of them: {named}"
            )
    return notes


def resizing(spec: str, found: Sequence[int], wanted: Sequence[int]) -> str:
    """The note that the images of a data set are brought to the learner's size."""
    return f"--data {spec}: images of {size_text(found)} are brought to the learner's {size_text(wanted)}"


def fitted(images: np.ndarray, shape: tuple[int, int, int], what: str) -> np.ndarray:
    """Bring uint8 images [n c h w] to (channels, height, width) with `core.images.fit`.

    Images that have this shape already are returned as they are. Raises UsageError, which begins with `what`, if their
    channels cannot be turned into the wanted ones.
    """
    if images.shape[1:] == shape:
        return np.ascontiguousarray(images)
    out = np.empty((len(images), *shape), np.uint8)
    try:
        for start in range(0, len(images), FIT_IMAGES):
            part = slice(start, start + FIT_IMAGES)
            out[part] = to_bytes(fit(to_pixels(images[part]), shape))
    except ValueError as error:
        raise UsageError(f"{what}: {error}") from None
    return out


def learner_input(inputs: Mapping[str, ImageSpec], *, unstated: Sequence[str] = ()) -> ImageSpec:
    """The input of the learner, from the inputs of the teachers, or of the data sets if there are no teachers.

    It has the largest channels, height and width among them. If all agree on mean and std, the learner takes these,
    else their averages; those of grey images are repeated for every channel. One normalisation serves all domains,
    because the first batch norm, with statistics of the batch, takes out shift and scale. Those in `unstated` state no
    mean and std, and count only if all are there. Raises UsageError for numbers of channels that are neither equal nor
    1 and c.
    """
    name, widest = max(inputs.items(), key=lambda item: item[1].channels)
    channels = widest.channels
    for other, image in inputs.items():
        if image.channels not in (1, channels):
            raise UsageError(
                f"{other} takes {size_text(image.shape)} images and {name} {size_text(widest.shape)}: channels of one "
                "run must be equal, or 1 and another number; split the pool or the data"
            )
    stated = [image for name, image in inputs.items() if name not in unstated] or list(inputs.values())
    return ImageSpec(
        channels=channels,
        height=max(image.height for image in inputs.values()),
        width=max(image.width for image in inputs.values()),
        mean=_agreed([image.mean * (channels // image.channels) for image in stated]),
        std=_agreed([image.std * (channels // image.channels) for image in stated]),
    )


def _agreed(values: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    if len(set(values)) == 1:
        return values[0]
    return tuple(sum(column) / len(values) for column in zip(*values, strict=True))


def _spec(one: datasets.ImageSet) -> ImageSpec:
    channels, height, width = one.shape
    return ImageSpec(channels=channels, height=height, width=width, mean=one.mean, std=one.std)


def _known(spec: str, split: str, names: set[str], cards: Sequence[TeacherCard]) -> list[str]:
    """A line that warns if teachers know classes of the episodes, since such classes are not new to the learner."""
    seen = names & {name for card in cards for name in card.classes}
    if not seen:
        return []
    return [f"--data {spec}, split {split}: teachers know {len(seen)} of its {len(names)} classes, which are not new"]


def _way(config: RunConfig, cards: Sequence[TeacherCard]) -> int:
    way = config.learner.way
    if not cards:
        return way or DEFAULT_WAY
    classes = {name for card in cards for name in card.classes}
    if way is not None and way > len(classes):
        raise UsageError(
            f"learner.way={way}: the teachers know {len(classes)} classes together; lower it, or add teachers"
        )
    return way or min(len(card.classes) for card in cards)
