"""Table 8 of IDEAL: a student of its own images without the teacher, and of other images with the teacher.

Usage: python -m benchmarks.papers.domain_gap SWEEP.yaml POOL SPEC OTHER [--seeds 0,1] [--rows scratch,other,distilled]

Three students of the first teacher of POOL, whose weights are there, tested on SPEC, in the loop that SWEEP.yaml sets,
with as many steps and images. `scratch`: the generator's images carry the classes that they were made for, and no
teacher is asked. `other`: the teacher names the classes of training images of OTHER, drawn at random, and there is no
generator. `distilled` is IDEAL: the teacher names the classes of the generator's images. Codes and wished classes of a
batch are drawn once (`method.code=fixed`) in all rows. Accuracy: top-1 of the last weights on the test split of SPEC.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ray_dfml.core.scoring import mean_ci95
from ray_dfml.core.steady import steady_logits
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.methods.base import Metrics, State, World
from ray_dfml.methods.ideal.config import Config
from ray_dfml.methods.students import distil, loop
from ray_dfml.methods.students.loop import Study, Work
from ray_dfml.methods.students.training import Lesson, Pupil
from ray_dfml.runtime.inputs import fitted
from ray_dfml.runtime.shard import Shard
from ray_dfml.sweeps import plan, spec
from ray_dfml.top1 import rows_known
from ray_dfml.types import Labelled, Teacher, TeacherCard


@dataclass
class Wishes:
    """Stands for a teacher: names the classes that a batch of the generator was made for (`students.stage.wished`)."""

    card: TeacherCard

    def query(self, images: np.ndarray) -> np.ndarray:
        """Labels int64 [n] of images [n c h w]."""
        return np.arange(len(images)) % len(self.card.classes)


@dataclass
class Named:
    """A teacher on this machine that names a class of each image, and whose questions nobody counts."""

    teacher: Teacher

    @property
    def card(self) -> TeacherCard:
        """What is known of the teacher."""
        return self.teacher.card

    def query(self, images: np.ndarray) -> np.ndarray:
        """Labels int64 [n] of images [n c h w]."""
        one, (mean, std) = self.teacher, map(torch.tensor, (self.card.image.mean, self.card.image.std))
        return steady_logits(one.net, one.theta, one.stats, images, mean, std).argmax(-1).numpy()


class Asking(Shard):
    """A shard without a ledger, all whose teachers name a class."""

    def service(self, id: str) -> Named:
        """The teacher of an id."""
        return Named(self.teacher(id))


def from_scratch(cfg: Config, study: Study) -> Metrics:
    """A round of `ideal` in which no teacher is asked."""
    study.service = Wishes(study.card)
    return distil.work(cfg, study)


def of_others(images: np.ndarray, cfg: Config, study: Study) -> Metrics:
    """A round in which the teacher is asked about some of other images, uint8 [n c h w], drawn at random."""
    study.lesson.average = cfg.average
    some = images[torch.randperm(len(images), generator=study.rng)[: study.batch.new].numpy()]
    study.keep(some, study.ask(some))
    return {"student/loss": distil.trained(cfg, study)}


def trained(cfg: Config, pool: Pool, work: Work, seed: int) -> State:
    """What is known of the first teacher's student after all rounds: `pupil`, its `images` and their `answers`."""
    card = pool.cards[0]
    world = World(cards=(card,), arch=card.arch, image=card.image, way=len(card.classes), seed=seed)
    shard = Asking(lambda id: (pool.entry(id).inside, *pool.load(id)))
    state = loop.init(cfg, world)
    for r in range(len(cfg.batches())):
        results = loop.recover(shard, loop.plan(cfg, world, state, r), cfg, work)
        if reason := results[0].get("rejected"):
            raise SystemExit(f"{card.id}: {reason}")
        state, _ = loop.learn(cfg, world, state, r, results, lambda *_: [])
    return state["students"][card.id]


def right(cfg: Config, card: TeacherCard, student: State, test: Labelled) -> np.ndarray:
    """100 for each test image [n] whose class the student names, else 0."""
    lesson = Lesson(cfg, loop.network(cfg, card), card.image, Pupil.of(student["pupil"]))
    rows, labels = rows_known(test, card.classes)
    return 100.0 * (lesson.logits(np.asarray(test.images)[rows]).argmax(-1).numpy() == labels)


def read(place: str, split: str, shape: tuple[int, int, int]) -> Labelled:
    """A split of a data set, its images brought to a shape."""
    whole = datasets.load(place)
    part = whole.subset(split)
    names = tuple(f"{whole.name}/{name}" for name in part.class_names)
    return Labelled(whole.identity, split, fitted(part.images, shape, place), part.labels, names)


def main() -> None:
    """Print a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("pool", type=Path)
    parser.add_argument("spec")
    parser.add_argument("other")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rows", default="scratch,other,distilled")
    args = parser.parse_args()
    first = plan.trials(spec.read(args.sweep), [str(args.pool)])[0]
    cfg = Config.model_validate(first.config.method.model_dump() | {"code": "fixed"})
    pool = Pool.open(args.pool)
    card = pool.cards[0]
    test, other = read(args.spec, "test", card.image.shape), read(args.other, "train", card.image.shape)
    works: dict[str, Work] = {
        "scratch": from_scratch, "other": partial(of_others, np.asarray(other.images)), "distilled": distil.work,
    }  # fmt: skip
    print("| row | seed | top-1 |\n|---|---|---|", flush=True)
    for seed in map(int, args.seeds.split(",")):
        for name in args.rows.split(","):
            mean, half = mean_ci95(right(cfg, card, trained(cfg, pool, works[name], seed), test))
            print(f"| {name} | {seed} | {mean:.2f} ± {half:.2f} |", flush=True)


if __name__ == "__main__":
    main()
