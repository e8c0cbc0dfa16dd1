"""One learner under several adaptations at test, on the same episodes: adaptation steps, and ICFIL on and off.

Usage: python -m benchmarks.papers.adaptation RUN SPEC [--shot 5] [--episodes 100] [--set eval.steps=20]... [--set ...]

Each --set is a row, with commas between its settings of `eval`; the first row is the run's own. Steps take the run's
own step size unless a row sets `eval.lr`. Differences are to the first row, paired by episode, with 95 % intervals.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ray_dfml.config import resolve
from ray_dfml.core.scoring import mean_ci95
from ray_dfml.data import datasets
from ray_dfml.evaluate import EvalConfig
from ray_dfml.learner import Learner
from ray_dfml.runtime.inputs import fitted
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.scorer import Episodes, Part, accuracies
from ray_dfml.types import Labelled


def row(learner: Learner, text: str) -> tuple[EvalConfig, float]:
    """The settings of a row, such as `eval.steps=5,eval.lr=0.1`, and the step size of its adaptation."""
    settings = [word for word in text.split(",") if word]
    given = [f"eval.bn={learner.bn}", f"eval.steps={learner.weights.steps}", f"eval.lr={learner.weights.lr!r}"]
    cfg = resolve("random", settings=[*given, *settings]).eval
    return cfg, cfg.lr


def measured(learner: Learner, data: Labelled, text: str, *, shot: int, episodes: int) -> np.ndarray:
    """Accuracies [episodes] in percent of a row."""
    cfg, lr = row(learner, text)
    weights = replace(learner.weights, steps=cfg.steps, lr=lr)
    of = Episodes(data=data.data, split=data.split, shot=shot, weights=weights.digest, lr=lr, reading="finetune")
    part = Part(episodes=of, start=0, stop=episodes)
    return accuracies(LocalBackend(no_teachers), cfg, weights, part, data, way=learner.way)


def lines(names: Sequence[str], found: Sequence[np.ndarray]) -> str:
    """Markdown: mean with its half-width, and the paired difference to the first row."""
    out = ["| adaptation | accuracy | difference |", "|---|---|---|"]
    for name, values in zip(names, found, strict=True):
        mean, half = mean_ci95(values)
        gain, width = mean_ci95(values - found[0])
        out.append(
            f"| {name or 'own'} | {mean:.2f} ± {half:.2f} | " + (f"{gain:+.2f} ± {width:.2f} |" if name else "|")
        )
    return "\n".join(out)


def main() -> None:
    """Print a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("spec")
    parser.add_argument("--split", default="test")
    parser.add_argument("--shot", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], dest="rows")
    args = parser.parse_args()
    learner, whole = Learner.load(args.run), datasets.load(args.spec)
    part = whole.subset(args.split)
    images = fitted(part.images, learner.image.shape, f"--data {args.spec}")
    data = Labelled(whole.identity, args.split, images, part.labels)
    names = ["", *args.rows]
    print(lines(names, [measured(learner, data, t, shot=args.shot, episodes=args.episodes) for t in names]))


if __name__ == "__main__":
    main()
