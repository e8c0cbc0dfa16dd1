"""Recovery time to equal quality: processor seconds until the images recovered from a pool are as good, in one run.

Usage: python benchmarks/recovery.py SPEC POOL [--quality 80,90] [--limit 240] [--updates 60]
Quality is the mean over teachers of the accuracy of a teacher on what was last recovered from it, in percent; every
teacher has had its turn. At that moment, with the images there are, a fresh learner gets `--updates` equal meta-updates
and is tested on 200 validation episodes, 5-way 5-shot, steps of 0.2: what the images are worth.

None of the three looks at a learner here: no adversarial or boundary term, no curriculum, and one teacher at a time.
One process, one thread, after a warm-up. FREE and PURER go on until they are there. BiDf-MKD recovers each teacher once
from nothing, so its effort is the number of iterations: the time is that of a whole pass with the fewest of ITERATIONS
that suffice, and the search for it is not counted. Both its sets count, and both must be as good. Presets of 28x28
characters.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ray_dfml.config import resolve
from ray_dfml.core import seeds
from ray_dfml.core.scoring import mean_ci95
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.evaluate import EvalConfig
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods import replay
from ray_dfml.methods.base import MetaConfig, World, initial_learner, learner_weights, teacher_job
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.characters import REPLAY
from ray_dfml.methods.free import method as free
from ray_dfml.methods.purer import eci
from ray_dfml.methods.purer import method as purer
from ray_dfml.runtime.local import LocalBackend
from ray_dfml.runtime.shard import Shard
from ray_dfml.scorer import Episodes, Part, accuracies
from ray_dfml.types import Labelled

ITERATIONS = (6, 8, 12, 16, 24, 32, 48)

Bank = dict[str, np.ndarray]
Step = tuple[dict[str, float], Callable[[], Bank]]
"""Teacher -> accuracy on what was just recovered from it, and how to get all images there are, by class."""


def _nothing(op: str, jobs: Any, shared: Any) -> list[Any]:
    return []


def free_rounds(world: World, shard: Shard) -> Iterator[Step]:
    """FIVE on four teachers in turn, and the generator's outer step."""
    cfg = resolve("free", preset="characters", settings=["method.warmup=1000000"]).method
    state, r, bank = free.init(cfg, world), 0, {}
    while True:
        cards = [world.cards[(4 * r + j) % len(world.cards)] for j in range(4)]
        jobs = [
            teacher_job(card, index=j, seed=seeds.derive(world.seed, r, j), values={}) for j, card in enumerate(cards)
        ]
        shared = free.shared(cfg, world, state, r)
        tasks = [task for job in jobs for task in shard.run("free.recover", [job], shared)]
        state, _ = free.learn(cfg, world, state, r, tasks, _nothing)
        for task in tasks:
            bank = bank_of.store(bank, task, "class", cfg.bank_capacity)
        yield {t["teacher"]: t["accuracy"] for t in tasks}, lambda found=bank: found
        r += 1


def purer_rounds(world: World, shard: Shard) -> Iterator[Step]:
    """Steps on the images of all teachers."""
    cfg = resolve("purer", preset="characters-purer", settings=["method.image_warmup=1000000"]).method
    state, r = purer.init(cfg, world), 0
    while True:
        jobs, shared = purer.plan(cfg, world, state, r), purer.shared(cfg, world, state, r)
        results = [result for job in jobs for result in shard.run("purer.recover", [job], shared)]
        state, _ = purer.learn(cfg, world, state, r, results, _nothing)
        images = state["images"]
        yield {x["teacher"]: x["accuracy"] for x in results}, lambda found=images: _of_teachers(world, found)
        r += 1


def _of_teachers(world: World, images: dict[str, Any]) -> Bank:
    bank: dict[str, list[np.ndarray]] = {}
    for card in world.cards:
        seen = eci.as_learner_sees(images[card.id]["x"], card.image, world.image).numpy()
        for i, name in enumerate(card.classes):
            bank.setdefault(name, []).append(seen[i :: len(card.classes)])
    return {name: np.concatenate(parts) for name, parts in bank.items()}


def bidf_pass(world: World, shard: Shard, iterations: int) -> Iterator[Step]:
    """Support and query set of one teacher after another, each from a new generator."""
    cfg = resolve(
        "bidf-mkd", preset="characters-bidf", settings=["method.boundary=false", f"method.iterations={iterations}"]
    ).method
    state, bank = bidf.init(cfg, world), {}
    for r, card in enumerate(world.cards):
        job = teacher_job(card, index=0, seed=seeds.derive(world.seed, r), values={})
        (found,) = shard.run("bidf-mkd.recover", [job], bidf.shared(cfg, world, state, r))
        for kind in ("support", "query"):
            bank = bank_of.store(bank, found[kind], "class", cfg.bank_capacity)
        yield {card.id: min(found[kind]["accuracy"] for kind in ("support", "query"))}, lambda found=bank: found


def until(
    steps: Iterator[Step], teachers: int, qualities: list[float], limit: float
) -> dict[float, tuple[float, Bank]]:
    """Quality -> processor seconds at which the mean accuracy first reached it, and the images there were."""
    latest: dict[str, float] = {}
    spent, reached = 0.0, {}
    while spent < limit and len(reached) < len(qualities):
        began = time.process_time()
        step = next(steps, None)
        spent += time.process_time() - began
        if step is None:
            break
        latest |= step[0]
        for quality in qualities:
            enough = len(latest) == teachers and np.mean(list(latest.values())) >= quality
            if enough and quality not in reached:
                reached[quality] = (spent, step[1]())
    return reached


def worth(world: World, data: Labelled, shard: Shard, bank: Bank, updates: int) -> tuple[float, float]:
    """Accuracy and its interval of a fresh learner after equal meta-updates on these images."""
    cfg = MetaConfig(**REPLAY)
    state = replay.with_optimiser(initial_learner(world))
    run = lambda op, jobs, shared: [x for job in jobs for x in shard.run(op, [job], shared)]  # noqa: E731
    for u in range(updates):
        state, _ = replay.update(cfg, world, state, bank, ("worth", u), run)
    cfg, weights = EvalConfig(), learner_weights(world, state, steps=10, lr=0.2)
    of = Episodes(weights=weights.digest, reading="finetune", data="validation", split="val", shot=5, lr=0.2)
    part = Part(episodes=of, start=0, stop=200)
    return mean_ci95(accuracies(LocalBackend({}.__getitem__), cfg, weights, part, data, way=world.way))


def main() -> None:
    """Print a row per method and quality, with ratios to FREE's time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec")
    parser.add_argument("pool")
    parser.add_argument("--quality", default="80,90")
    parser.add_argument("--limit", type=float, default=240.0)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    qualities = [float(q) for q in given.quality.split(",")]
    pool = Pool.open(given.pool)
    shard = Shard(lambda id: (pool.entry(id).card, *pool.load(id)))
    world = World(cards=pool.cards, arch="conv4", image=pool.cards[0].image, way=5, seed=given.seed)
    part = datasets.load(given.spec).subset("val")
    data = Labelled("validation", "val", np.ascontiguousarray(part.images), part.labels)
    for warm in (free_rounds(world, shard), purer_rounds(world, shard), bidf_pass(world, shard, 2)):
        next(warm)
    found = {
        name: until(rounds(world, shard), len(world.cards), qualities, given.limit)
        for name, rounds in (("free", free_rounds), ("purer", purer_rounds))
    }
    passes: dict[float, tuple[float, Bank]] = {}
    for iterations in ITERATIONS:
        left = [q for q in qualities if q not in passes]
        new = until(bidf_pass(world, shard, iterations), len(world.cards), left, given.limit) if left else {}
        for q in new:
            print(f"bidf-mkd: {q:g} % with {iterations} iterations", flush=True)
        passes |= new
    found["bidf-mkd"] = passes
    print("| quality | method | seconds | times FREE's | images | learner, 5-shot |\n|---|---|---|---|---|---|")
    random = worth(world, data, shard, {}, 0)
    for quality in qualities:
        for name, reached in found.items():
            if quality not in reached:
                print(f"| {quality:g} % | {name} | not reached | - | - | - |", flush=True)
                continue
            seconds, bank = reached[quality]
            ratio = f"{seconds / found['free'][quality][0]:.2f}" if quality in found["free"] else "-"
            score = "{:.2f} ± {:.2f}".format(*worth(world, data, shard, bank, given.updates))
            count = sum(len(images) for images in bank.values())
            print(f"| {quality:g} % | {name} | {seconds:.0f} | {ratio} | {count} | {score} |", flush=True)
    print(f"Not reached: in {given.limit:g} s, by BiDf-MKD with up to {ITERATIONS[-1]} iterations.")
    print("A learner that was never trained: {:.2f} ± {:.2f}".format(*random))


if __name__ == "__main__":
    main()
