"""`evaluate`: an exported learner on real episodes, and `random` on the same ones."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml import evaluate
from ray_dfml.core import seeds
from ray_dfml.data import datasets
from ray_dfml.errors import DfmlError, UsageError
from ray_dfml.evaluate import EvalConfig
from ray_dfml.learner import Learner
from ray_dfml.pipeline import Score
from ray_dfml.runtime.inputs import check_episodes, fitted, resizing
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.scores import as_row


def meta_test(
    weights: Path, *, spec: str, split: str, way: int | None, shots: Sequence[int], episodes: int, bn: str | None,
    seed: int, workers: int, backend: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows as in `scores.json`. Images of another size are brought to the learner's, with a line on stderr.

    Raises UsageError where the data's channels or `way` do not fit the learner.
    """
    learner = Learner.load(weights)
    part = datasets.load(spec).subset(split)
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
         "steps": learner.steps, "lr": learner.lr}
    )  # fmt: skip
    check_episodes(part.labels, f"--data {spec}, split {split}", way, cfg)
    fresh = learner.net.init(seeds.generator(learner.seed, "theta"), zero_head_bias=True)
    candidates = [
        (learner.method, learner.selection, learner.profile, learner.theta, learner.stats),
        ("random", "last", "fixed", fresh, learner.net.initial_stats()),
    ]
    if backend == "ray":
        from ray_dfml.runtime.cluster import shards_of

        place = shards_of(workers)
    else:
        place = nullcontext(LocalBackend(no_teachers))
    rows = []
    with place as here:
        for method, selection, profile, theta, stats in candidates:
            for shot in cfg.shots:
                shared = evaluate.shared(
                    cfg, arch=learner.arch, image=learner.image, outputs=learner.way, theta=theta.numpy(),
                    stats=stats.numpy(), reading="finetune", lr=learner.lr, head=learner.head,
                    images=images, labels=part.labels,
                )  # fmt: skip
                results = here.map("evaluate", evaluate.jobs(cfg, way=way, shot=shot, count=episodes), shared)
                failed = [r["rejected"] for r in results if "rejected" in r]
                if failed:
                    raise DfmlError(f"evaluation failed: {failed[0]}")
                score = Score(
                    method=method, data=spec, split=split, way=way, shot=shot, bn=cfg.bn, selection=selection,
                    accuracies=np.concatenate([r["accuracies"] for r in results]),
                )  # fmt: skip
                rows.append(as_row(score, profile))
    return rows
