"""Seconds that each method needs until every teacher of a pool has a recovered set of a given quality, in one run.

Usage: python benchmarks/recovery.py POOL [--quality 95] [--limit 400]
Quality is the accuracy of a teacher on the images last recovered from it, in percent. One process, one thread,
processor time; the methods take the teachers in turn and train no learner. Presets of 28x28 characters.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np

from ray_dfml.config import resolve
from ray_dfml.core import seeds
from ray_dfml.data.pool import Pool
from ray_dfml.methods import bidf, free, purer
from ray_dfml.methods.base import World, teacher_job
from ray_dfml.runtime.shard import Shard

Step = tuple[dict[str, float], int]
"""Teacher -> accuracy on what was just recovered from it, and the number of images made."""


def free_rounds(world: World, shard: Shard) -> Iterator[Step]:
    """FIVE on four teachers at a time, and the generator's outer step."""
    cfg = resolve("free", preset="characters", sets=["method.warmup=1000000"]).method
    state, r = free.init(cfg, world), 0
    while True:
        cards = [world.cards[(4 * r + j) % len(world.cards)] for j in range(4)]
        jobs = [
            teacher_job(card, index=j, seed=s, values={"slots": [(card.id, s)]})
            for j, card in enumerate(cards)
            for s in [seeds.derive(0, r, j)]
        ]
        shared = free.shared(cfg, world, state, r)
        results = [result for job in jobs for result in shard.run("free.recover", [job], shared)]
        state, _ = free.learn(cfg, world, state, r, results, lambda op, jobs, shared: [])
        tasks = [task for result in results for task in result["tasks"]]
        yield {t["teacher"]: t["accuracy"] for t in tasks}, sum(len(t["images"]) for t in tasks)
        r += 1


def purer_rounds(world: World, shard: Shard) -> Iterator[Step]:
    """Steps on the images of all teachers."""
    cfg = resolve("purer", preset="characters-purer", sets=["method.image_warmup=1000000"]).method
    state, r = purer.init(cfg, world), 0
    while True:
        jobs, shared = purer.plan(cfg, world, state, r), purer.shared(cfg, world, state, r)
        results = [result for job in jobs for result in shard.run("purer.recover", [job], shared)]
        state, _ = purer.learn(cfg, world, state, r, results, lambda op, jobs, shared: [])
        yield {x["teacher"]: x["accuracy"] for x in results}, sum(len(x["x"]) for x in results) if r == 0 else 0
        r += 1


def bidf_rounds(world: World, shard: Shard) -> Iterator[Step]:
    """Support and query set of one teacher after another, each from a new generator."""
    cfg = resolve("bidf-mkd", preset="characters-bidf").method
    state, r = bidf.init(cfg, world), 0
    while True:
        card = world.cards[r % len(world.cards)]
        job = teacher_job(card, index=0, seed=seeds.derive(0, r), values={})
        (found,) = shard.run("bidf-mkd.recover", [job], bidf.shared(cfg, world, state, r))
        low = min(found[kind]["accuracy"] for kind in ("support", "query"))
        yield {card.id: low}, sum(len(found[kind]["images"]) for kind in ("support", "query"))
        r += 1


def main() -> None:
    """Print one row per method, and ratios to FREE."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pool")
    parser.add_argument("--quality", type=float, default=95.0)
    parser.add_argument("--limit", type=float, default=400.0)
    given = parser.parse_args()
    pool = Pool.open(given.pool)
    shard = Shard(lambda id: (pool.entry(id).card, *pool.load(id)))
    world = World(cards=pool.cards, arch="conv4", image=pool.cards[0].image, way=5, seed=0)
    methods: dict[str, Callable[[World, Shard], Iterator[Step]]] = {
        "free": free_rounds, "purer": purer_rounds, "bidf-mkd": bidf_rounds,
    }  # fmt: skip
    print(
        f"| method | mean >= {given.quality:g} % | every teacher >= {given.quality:g} % | images | s per 1000 images |"
    )
    print("|---|---|---|---|---|")
    reached: dict[str, list[float]] = {}
    for name, rounds in methods.items():
        latest: dict[str, float] = {}
        spent, images, marks = 0.0, 0, [np.nan, np.nan]
        steps = rounds(world, shard)
        while spent < given.limit and np.isnan(marks).any():
            began = time.process_time()
            found, made = next(steps)
            spent += time.process_time() - began
            latest, images = latest | found, images + made
            if len(latest) == len(world.cards):
                for i, value in enumerate((np.mean(list(latest.values())), min(latest.values()))):
                    marks[i] = spent if np.isnan(marks[i]) and value >= given.quality else marks[i]
        reached[name] = marks
        shown = [f"{mark:.0f} s" if mark == mark else f"not in {given.limit:.0f} s" for mark in marks]
        print(f"| {name} | {shown[0]} | {shown[1]} | {images} | {1000 * spent / images:.1f} |", flush=True)
    for name, marks in reached.items():
        print(f"{name}: {marks[0] / reached['free'][0]:.2f} and {marks[1] / reached['free'][1]:.2f} times FREE's time")


if __name__ == "__main__":
    main()
