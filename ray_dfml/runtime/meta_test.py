"""`evaluate` tests an exported learner on real episodes, and `random` on the same ones. Students get top-1 scores."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml import published
from ray_dfml.data import datasets
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.evaluate import EvalConfig
from ray_dfml.files import Uri, located
from ray_dfml.learner import Learner
from ray_dfml.methods import UNTRAINED, cost
from ray_dfml.methods.base import World
from ray_dfml.methods.baselines import untrained
from ray_dfml.runtime import cost_lines
from ray_dfml.runtime.inputs import fitted, resizing, small_classes
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.top1_test import student_test
from ray_dfml.scorer import Entry, Episodes, Part, Scorer, Set, accuracies
from ray_dfml.scores import as_row
from ray_dfml.student import of_run
from ray_dfml.types import Backend, Labelled, LearnerWeights

readings = ("finetune",)
"""The readings of an exported learner."""

TIMED = 5
"""How many episodes are timed before an evaluation: as many as adapt together."""


def meta_test(
    weights: Path | Uri, *, spec: str, split: str, way: int | None, shots: Sequence[int], episodes: int, bn: str | None,
    seed: int, workers: int, backend: str, quiet: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Test a learner, or students (`top1_test`), which have no episodes. Returns rows as in `scores.json`.

    The learner adapts with its own step. As in `train`, `random` gets the best of the default `eval.lrs` on validation
    episodes, or the learner's step if the data have none; a line says which. Images of another size are brought to the
    learner's, and a line says so. Raises UsageError if the channels of the data or `way` do not fit the learner.
    """
    progress = Progress(quiet=quiet)
    weights = published.local(located(weights))
    students = of_run(weights)
    if students:
        shards = workers if backend == "ray" else 1
        with _shards(backend, workers) as here:
            return student_test(students, here, progress, spec=spec, split=split, shards=shards)
    learner = Learner.load(weights)
    way = way or learner.way
    if way > learner.way:
        raise UsageError(f"--way {way}: the learner has {learner.way} outputs")
    if not shots:
        raise UsageError("--shot: name at least one")
    of = learner.weights
    cfg = EvalConfig.model_validate(
        {"episodes": episodes, "shots": tuple(shots), "bn": bn or learner.bn, "seed": seed, "steps": of.steps,
         "lr": of.lr, "lrs": ()}
    )  # fmt: skip
    sets = _sets(spec, split, learner, way, cfg, progress)
    world = World(cards=(), arch=of.arch, image=of.image, way=of.outputs, seed=learner.seed, head=of.head)
    fresh = untrained(world, steps=cfg.steps, lr=cfg.lr)
    known = {one.digest: one for one in (of, fresh)}
    with _shards(backend, workers) as here:
        kept = {one.split: replace(one, images=here.keep(one.images)) for one in sets}

        def ask(part: Part) -> np.ndarray:
            of_part = part.episodes
            return accuracies(here, cfg, known[of_part.weights], part, kept[of_part.split], way=way)

        def scorer(lrs: tuple[float, ...], val: list[Set]) -> Scorer:
            return Scorer(
                cfg.model_copy(update={"lrs": lrs}), way=way, head=of.head, val=val, test=[(sets[0].data, split)],
                ask=ask, shards=workers if backend == "ray" else 1, on_work=progress.advance,
            )  # fmt: skip

        choice = [(one.data, one.split) for one in sets if one.split == "val"]
        own, other = scorer((), []), scorer(EvalConfig().lrs, choice)
        tests = [
            (own, Entry(method=learner.method, selection=learner.selection, weights=of.digest, readings=readings)),
            (other, Entry(method=UNTRAINED, selection="last", weights=fresh.digest, readings=readings)),
        ]
        total = sum(one.total(lambda ghost, entry=entry: ghost.test([entry])) for one, entry in tests)
        if not quiet:
            shards = workers if backend == "ray" else 1
            progress.note(cost_lines.of_evaluation(lambda: total * _seconds(own, of, cfg, sets[0], way), shards))
        try:
            with progress.stage("evaluation", total):
                scores = [one.test([entry]) for one, entry in tests]
        finally:
            progress.stop()
        for step in other.steps([tests[1][1]]):
            progress.note(f"{UNTRAINED} adapts with steps of {step.lr:g}, chosen on validation episodes of these data")
    profiles = (learner.profile, "fixed")
    return [as_row(score, profile) for of_one, profile in zip(scores, profiles, strict=True) for score in of_one]


def _seconds(scorer: Scorer, weights: LearnerWeights, cfg: EvalConfig, on: Labelled, way: int) -> float:
    """Seconds of a unit of work of the scorer: a few episodes of the largest shot are timed."""
    of = Episodes(
        weights=weights.digest, reading="finetune", data=on.data, split=on.split, shot=max(cfg.shots), lr=cfg.lr
    )  # fmt: skip
    part, backend = Part(episodes=of, start=0, stop=TIMED), LocalBackend(no_teachers)
    return cost.seconds(lambda: accuracies(backend, cfg, weights, part, on, way=way)) / scorer.work(part)


def _sets(spec: str, split: str, learner: Learner, way: int, cfg: EvalConfig, progress: Progress) -> list[Labelled]:
    """The images of the split, and if `random` takes steps, those of `val`, on which their size is chosen."""
    whole = datasets.load(spec)
    sets = []
    for name in (split,) if learner.weights.head == "protonet" else dict.fromkeys((split, "val")):
        what = f"--data {spec}, split {name}"
        try:
            part = whole.subset(name)
            small = small_classes(part, what, way, cfg)
        except (UsageError, RejectedError):
            if name == split:
                raise
            progress.note(f"{UNTRAINED} adapts with the learner's step: {spec} has no validation episodes")
            continue
        if name == split:
            for note in [f"--data {spec}: {note}" for note in part.notes] + small:
                progress.note(note)
            if part.shape != learner.image.shape:
                progress.note(resizing(spec, part.shape, learner.image.shape))
        images = fitted(part.images, learner.image.shape, f"--data {spec}")
        sets.append(Labelled(whole.identity, name, images, part.labels))
    return sets


@contextmanager
def _shards(backend: str, workers: int) -> Iterator[Backend]:
    """A backend for jobs without teachers."""
    if backend == "local":
        yield LocalBackend(no_teachers)
        return
    from ray_dfml.runtime.cluster import shards_of

    with shards_of(workers) as shards:
        yield shards
