"""`evaluate`: an exported learner on real episodes, and `random` on the same ones."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml.data import datasets
from ray_dfml.errors import UsageError
from ray_dfml.evaluate import EvalConfig
from ray_dfml.learner import Learner
from ray_dfml.methods.base import World
from ray_dfml.methods.baselines import untrained
from ray_dfml.runtime.inputs import fitted, resizing, small_classes
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.scorer import Entry, Part, Scorer, accuracies
from ray_dfml.scores import as_row
from ray_dfml.types import Labelled


def meta_test(
    weights: Path, *, spec: str, split: str, way: int | None, shots: Sequence[int], episodes: int, bn: str | None,
    seed: int, workers: int, backend: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows as in `scores.json`. Images of another size are brought to the learner's, with a line on stderr.

    Raises UsageError where the data's channels or `way` do not fit the learner.
    """
    learner = Learner.load(weights)
    whole = datasets.load(spec)
    part = whole.subset(split)
    for note in part.notes:
        print(f"--data {spec}: {note}", file=sys.stderr)
    images = fitted(part.images, learner.image.shape, f"--data {spec}")
    if part.shape != learner.image.shape:
        print(resizing(spec, part.shape, learner.image.shape), file=sys.stderr)
    way = way or learner.way
    if way > learner.way:
        raise UsageError(f"--way {way}: the learner has {learner.way} outputs")
    if not shots:
        raise UsageError("--shot: name at least one")
    cfg = EvalConfig.model_validate(
        {"episodes": episodes, "shots": tuple(shots), "bn": bn or learner.bn, "seed": seed,
         "steps": learner.weights.steps, "lr": learner.weights.lr}
    )  # fmt: skip
    for note in small_classes(part, f"--data {spec}, split {split}", way, cfg):
        print(note, file=sys.stderr)
    world = World(
        cards=(), arch=learner.weights.arch, image=learner.image, way=learner.way, seed=learner.seed,
        head=learner.weights.head,
    )  # fmt: skip
    fresh = untrained(world, steps=cfg.steps, lr=cfg.lr)
    known = {weights.digest: weights for weights in (learner.weights, fresh)}
    labelled = Labelled(whole.identity, split, images, part.labels)
    if backend == "ray":
        from ray_dfml.runtime.cluster import shards_of

        place = shards_of(workers)
    else:
        place = nullcontext(LocalBackend(no_teachers))
    with place as here:
        kept = replace(labelled, images=here.keep(labelled.images))

        def ask(part: Part) -> np.ndarray:
            return accuracies(here, cfg, known[part.episodes.weights], part, kept, way=way)

        scorer = Scorer(cfg, way=way, head=world.head, val=(), test=[(whole.identity, split)], ask=ask)
        entries = [
            Entry(method=method, selection=selection, weights=weights.digest, readings=("finetune",))
            for method, selection, weights in (
                (learner.method, learner.selection, learner.weights), ("random", "last", fresh)
            )
        ]  # fmt: skip
        scores = [scorer.test([entry]) for entry in entries]
    profiles = (learner.profile, "fixed")
    return [as_row(score, profile) for of, profile in zip(scores, profiles, strict=True) for score in of]
