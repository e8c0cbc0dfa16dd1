"""`pool build` trains many teachers on the backend, each on its own classes, and puts them into a pool.

The classes of a teacher are a uniform random subset of the meta-train classes. The first 80 % of the images of a class
are for training, and the last 20 % are held out for the accuracies that the pool reports.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ray_dfml.core import seeds
from ray_dfml.core.net import net
from ray_dfml.data import datasets, weights_file
from ray_dfml.data.manifest import make_entry
from ray_dfml.data.pool import Pool
from ray_dfml.data.pretrain import PretrainConfig, pretrain
from ray_dfml.errors import DfmlError, UsageError, first_of
from ray_dfml.methods import cost
from ray_dfml.runtime.local import no_teachers
from ray_dfml.runtime.shard import Shard
from ray_dfml.types import Access, Arrays, Backend, ImageSpec, Job

Planned = tuple[str, str, tuple[str, ...], Job]
"""A teacher of a plan: id, architecture, class names, and the job that trains it."""

HELD_OUT = 0.2
TIMED = 256
"""Images of a teacher that are timed before a pool is built."""
LEAST = 2
"""The fewest images of a class that a teacher can learn: one to train and one to hold out."""


def plan(
    spec: str, *, models: int, archs: Sequence[str], way: int, seed: int, note: Callable[[str], None] | None = None
) -> tuple[ImageSpec, list[Planned]]:
    """Plan the teachers of a pool: their input, and (id, architecture, class names, pretrain job) for each.

    `note` is called with each line that a reader must know about the data. Raises UsageError if the training split has
    fewer than `way` classes with enough images, or if a pool could not hold such a teacher, and RejectedError
    if an architecture cannot take such images.
    """
    train = datasets.load(spec).subset("train")
    lines = list(train.notes)
    channels, height, width = train.shape
    image = ImageSpec(channels=channels, height=height, width=width, mean=train.mean, std=train.std)
    members = {c: np.flatnonzero(train.labels == c) for c in range(len(train.class_names))}
    small = [train.class_names[c] for c, rows in members.items() if len(rows) < LEAST]
    members = {c: rows for c, rows in members.items() if len(rows) >= LEAST}
    if small:
        lines.append(
            f"{len(small)} of {len(train.class_names)} training classes have one image, too few to train and to hold "
            f"out, and are left out: {first_of(small)}"
        )
    if len(members) < way:
        raise UsageError(
            f"--way {way}: the training split of {spec} has {len(members)} classes of {LEAST} images or more"
            + (f"; {lines[-1]}" if small else "")
        )
    if note is not None:
        for line in lines:
            note(f"--data {spec}: {line}")
    for arch in archs:
        weights_file.parts(arch, image, way)  # an architecture that cannot take such images is refused here
    usable = list(members)
    planned = []
    for i in range(models):
        rng = seeds.rng(seed, "classes", i)
        chosen = [usable[n] for n in torch.randperm(len(usable), generator=rng)[:way].tolist()]
        rows = np.concatenate([members[c] for c in chosen])
        labels = np.concatenate([np.full(len(members[c]), local) for local, c in enumerate(chosen)])
        held = np.concatenate([_held_out(len(members[c])) for c in chosen])
        arch = archs[i % len(archs)]
        values: Arrays = {
            "arch": arch,
            "shape": image.shape,
            "mean": np.array(image.mean, np.float32),
            "std": np.array(image.std, np.float32),
            "way": way,
            "rows": rows,
            "labels": labels,
            "held_out": held,
        }
        cost = float(len(rows) * net(arch, image.shape, way).macs)
        job = Job(index=i, seed=seeds.derive(seed, "pretrain", i), values=values, cost=cost)
        names = tuple(f"{train.name}/{train.class_names[c]}" for c in chosen)
        id = f"{train.name}-{arch}-{i:04d}"
        make_entry(id, arch, image, names, None, _source(spec, seed), "")  # what a pool cannot hold is refused here
        planned.append((id, arch, names, job))
    return image, planned


def lacking(pool: Pool, planned: Sequence[Planned]) -> list[Planned]:
    """The planned teachers that a pool does not have yet."""
    have = {card.id for card in pool.cards}
    return [one for one in planned if one[0] not in have]


def seconds(spec: str, planned: Sequence[Planned], cfg: PretrainConfig) -> float:
    """Seconds that these teachers take to train in one process, if it is as fast as this one.

    Of each architecture one pass over at most TIMED images of its first teacher is timed.
    """
    images, total = datasets.load(spec).subset("train").images, 0.0
    shared = {"cfg": cfg.model_copy(update={"epochs": 1}).model_dump()}
    for arch in dict.fromkeys(arch for _, arch, _, _ in planned):
        jobs = [job for _, of, _, job in planned if of == arch]
        values = jobs[0].values
        every = slice(None, None, -(-len(values["rows"]) // TIMED))
        part = {name: values[name][every] for name in ("rows", "labels", "held_out")}
        job = replace(jobs[0], values={**values, **part, "images": images[part["rows"]]})
        share = len(part["rows"]) / len(values["rows"])
        timed = cost.seconds(lambda job=job: pretrain(Shard(no_teachers), [job], shared))
        total += cfg.epochs * timed / share * sum(job.cost for job in jobs) / jobs[0].cost
    return total


def _held_out(count: int) -> np.ndarray:
    return np.arange(count) >= int(count * (1 - HELD_OUT))


def _source(spec: str, seed: int) -> str:
    return f"pool build {spec.split(':')[0]} seed {seed}"


def build(
    path: Pool, spec: str, image: ImageSpec, planned: Sequence[Planned],
    cfg: PretrainConfig, *, backend: Backend, at_once: int = 1, seed: int, on_teacher: Callable[[str, float], None],
    access: Access = "weights",
) -> list[float]:  # fmt: skip
    """Train the planned teachers that the pool lacks, and add each when it is done.

    The backend gets `at_once` teachers at a time, and `access` is what they give away in the pool. Returns the held-out
    accuracies of all teachers in percent.
    """
    have = {card.id: card for card in path.cards}
    for id, _, classes, _ in planned:
        if id in have and have[id].classes != classes:
            raise UsageError(
                f"{path.path}: {id} has other classes than --seed {seed} and --way give; use the first build's"
            )
    todo = lacking(path, planned)
    accuracies = [card.accuracy for card in have.values() if card.accuracy is not None]
    shared: Arrays = {"cfg": cfg.model_dump()}

    def keep(results: Sequence[Arrays], items: Sequence[Planned]) -> None:
        for (id, arch, classes, _), result in zip(items, results, strict=True):
            if "rejected" in result:
                raise DfmlError(f"{id}: {result['rejected']}; lower pretrain.lr")
            network = net(arch, image.shape, len(classes))
            tensors = network.layout.unflatten(torch.tensor(result["theta"]))
            tensors |= network.stats_layout.unflatten(torch.tensor(result["stats"]))
            best, last = result["accuracy_best"], result["accuracy_last"]
            source = f"{_source(spec, seed)} epochs {cfg.epochs}"
            path.add(
                id, tensors, arch=arch, image=image, classes=classes,
                accuracy={"reported": best, "best": best, "last": last}, source=source, access=access,
            )  # fmt: skip
            accuracies.append(best)
            on_teacher(id, best)

    images = datasets.load(spec).subset("train").images

    def with_images(job: Job) -> Job:
        return replace(job, values={**job.values, "images": np.ascontiguousarray(images[job.values["rows"]])})

    for start in range(0, len(todo), at_once):
        part = todo[start : start + at_once]
        keep(backend.map("pretrain", [with_images(item[3]) for item in part], shared), part)
    return accuracies
