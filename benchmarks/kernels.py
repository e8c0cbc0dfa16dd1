"""How much faster the same work is than at commit 7ac49db: seconds of one processor, in one interleaved run.

Usage: git worktree add ../base 7ac49db
       python benchmarks/kernels.py ../base [--cases "replay;recovery"] [--repeats 7]

Two processes do the same work on the same inputs, one with this tree's `ray_dfml` and one with the other's. They are
pinned to one processor with one thread each, warm up once, and then take turns: while one works the other waits. A
ratio is the median over the repeats of (processor seconds there / processor seconds here); beside it stand the least
and the greatest. On an accelerator the seconds are those of the clock on the wall. Given `.`, a tree is
compared with itself, which shows what is noise.

The work, for learners and teachers of 5 classes: a replay update of 10 second-order tasks with 15 queries per class and
5 inner steps; a recovery of 100 images from each of 4 teachers by k = 5 adaptation steps; an outer step of BELL on 4
recovered tasks; 20 test episodes of 10 steps; two epochs of pretraining on 96 images per class.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLOUR, GREY = (3, 32, 32), (1, 28, 28)
CASES: dict[str, dict[str, Any]] = {
    "replay, Conv4-32, 5-shot": {"work": "replay", "arch": "conv4", "shape": COLOUR, "shot": 5},
    "replay, Conv4-32, grey 1-shot": {"work": "replay", "arch": "conv4", "shape": GREY, "shot": 1},
    "replay, Conv4-64, 5-shot": {"work": "replay", "arch": "conv4-64", "shape": COLOUR, "shot": 5, "tasks": 4},
    "recovery, Conv4-32": {"work": "recovery", "arch": "conv4", "shape": COLOUR},
    "recovery, Conv4-64": {"work": "recovery", "arch": "conv4-64", "shape": COLOUR},
    "recovery, ResNet-10": {"work": "recovery", "arch": "resnet10", "shape": COLOUR, "teachers": 1},
    "BELL, Conv4-32": {"work": "bell", "arch": "conv4", "shape": COLOUR},
    "BELL, Conv4-64": {"work": "bell", "arch": "conv4-64", "shape": COLOUR},
    "BELL, ResNet-10": {"work": "bell", "arch": "resnet10", "shape": COLOUR, "teachers": 2},
    "test episodes, Conv4-32, 5-shot": {"work": "episodes", "arch": "conv4", "shape": COLOUR, "shot": 5},
    "test episodes, Conv4-32, 1-shot": {"work": "episodes", "arch": "conv4", "shape": COLOUR, "shot": 1},
    "test episodes, Conv4-64, 5-shot": {"work": "episodes", "arch": "conv4-64", "shape": COLOUR, "shot": 5},
    "test episodes, ResNet-10, 1-shot": {
        "work": "episodes", "arch": "resnet10", "shape": COLOUR, "shot": 1, "episodes": 1,
    },
    "pretraining, Conv4-32": {"work": "pretraining", "arch": "conv4", "shape": COLOUR},
}  # fmt: skip


def work_of(case: dict[str, Any]) -> Callable[[], object]:
    """The work of a case, done with whatever `ray_dfml` this process imports."""
    import torch

    from ray_dfml.core.net import net
    from ray_dfml.methods import METHODS, replay
    from ray_dfml.methods.base import World
    from ray_dfml.runtime.shard import Shard
    from ray_dfml.types import ImageSpec, TeacherCard

    arch, shape, kind, way = case["arch"], case["shape"], case["work"], 5
    image = ImageSpec(
        channels=shape[0], height=shape[1], width=shape[2], mean=(0.5,) * shape[0], std=(0.25,) * shape[0]
    )
    cards = tuple(
        TeacherCard(id=f"t{i}", arch=arch, image=image, classes=tuple(f"data/{i}-{c}" for c in range(way)))
        for i in range(case.get("teachers", 4))
    )
    network, rng = net(arch, shape, way), torch.Generator().manual_seed(0)
    weights = {}
    for card in cards:
        theta = network.init(rng)
        stats = network.with_stats(theta, torch.randn(64, *shape, generator=rng))[1]
        weights[card.id] = (card, theta.numpy(), stats.numpy())
    shard, free = Shard(weights.__getitem__), METHODS["free"]
    at = {"device": str(shard.device)} if hasattr(World, "device") else {}
    world = World(cards=cards, arch=arch, image=image, way=way, seed=0, **at)
    cfg = free.Config.model_validate({
        "teachers_per_round": len(cards), "warmup": 0, "alignment_every": 0,
        "replay": {"shot": case.get("shot", 5), "tasks": case.get("tasks", 10)},
    })  # fmt: skip
    state = free.init(cfg, world)

    def pixels(count: int) -> Any:
        return torch.randint(0, 256, (count, *shape), generator=rng, dtype=torch.uint8).numpy()

    def send(op: str, jobs: Any, shared: Any) -> list[Any]:
        return [result for job in jobs for result in shard.run(op, [job], shared)]

    if kind == "replay":
        meta = cfg.replay
        tasks = [{"support": pixels(way * meta.shot), "query": pixels(way * meta.query)} for _ in range(meta.tasks)]
        return lambda: replay.step(meta, world, state, tasks, (0,), send)
    if kind == "recovery":
        jobs, shared = free.plan(cfg, world, state, 0), free.shared(cfg, world, state, 0)
        return lambda: send("free.recover", jobs, shared)
    if kind == "bell":
        sets = [
            (
                torch.randn(100, *shape, generator=rng),
                torch.randn(100, way, generator=rng),
                torch.arange(way).repeat(20),
            )
            for _ in cards
        ]
        return _bell(cfg, world, state, sets)
    labels = torch.arange(8).repeat_interleave(40).numpy()
    if kind == "episodes":
        return _episodes(case, network, image, weights["t0"], pixels(len(labels)), labels, send)
    return _pretraining(arch, image, pixels, send)


def _bell(cfg: Any, world: Any, state: Any, sets: list[Any]) -> Callable[[], object]:
    try:
        from ray_dfml.methods.free import bell
    except ImportError:
        from ray_dfml.methods import bell
    tasks = [bell.DistillSet(*one) for one in sets]
    return lambda: bell.update(cfg, world, state, tasks, 1)


def _episodes(
    case: dict[str, Any], network: Any, image: Any, loaded: Any, images: Any, labels: Any, send: Any
) -> Callable[[], object]:
    from ray_dfml import evaluate, types

    cfg = evaluate.EvalConfig()
    _, theta, stats = loaded
    if hasattr(types, "LearnerWeights"):
        import torch

        weights = types.LearnerWeights(
            arch=case["arch"], image=image, outputs=network.ways, theta=torch.tensor(theta), stats=torch.tensor(stats),
            head="maml", steps=cfg.steps, lr=cfg.lr,
        )  # fmt: skip
        shared = evaluate.shared(cfg, weights, reading="finetune", images=images, labels=labels)
        jobs = evaluate.jobs(cfg, way=network.ways, shot=case["shot"], stop=case.get("episodes", 20))
    else:
        shared = evaluate.shared(
            cfg, arch=case["arch"], image=image, outputs=network.ways, theta=theta, stats=stats, reading="finetune",
            lr=None, head="maml", images=images, labels=labels,
        )  # fmt: skip
        jobs = evaluate.jobs(cfg, way=network.ways, shot=case["shot"], count=case.get("episodes", 20))
    return lambda: send("evaluate", jobs, shared)


def _pretraining(arch: str, image: Any, pixels: Any, send: Any) -> Callable[[], object]:
    import numpy as np

    from ray_dfml.data.pretrain import PretrainConfig
    from ray_dfml.types import Job

    labels = np.arange(5).repeat(120)
    values = {
        "arch": arch, "shape": image.shape, "way": 5, "labels": labels, "images": pixels(len(labels)),
        "held_out": np.arange(len(labels)) % 5 == 0,
        "mean": np.array(image.mean, np.float32), "std": np.array(image.std, np.float32),
    }  # fmt: skip
    shared = {"cfg": PretrainConfig(epochs=2).model_dump()}
    return lambda: send("pretrain", [Job(index=0, seed=0, values=values)], shared)


def serve() -> None:
    """Do the work that is named on standard input, a line a time, and answer with the seconds it took."""
    import torch

    torch.set_num_threads(1)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    known: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in known:
            known = {name: work_of(CASES[name])}
        began = clock()
        known[name]()
        print(clock() - began, flush=True)


class Side:
    """A process that does the work with the `ray_dfml` of a tree."""

    def __init__(self, tree: Path, processor: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"], env=environment, cwd=tree, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, {processor}),
        )  # fmt: skip

    def seconds(self, case: str) -> float:
        """Processor seconds of one repeat."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def commit(tree: Path) -> str:
    """What a tree is a checkout of."""
    words = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure, and print a table row a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("against", type=Path, nargs="?", help="a checkout of the commit to compare with")
    parser.add_argument("--cases", default="", help="beginnings of names with ; between them; default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve()
    here = Path(__file__).resolve().parents[1]
    processor = max(os.sched_getaffinity(0))
    sides = [Side(given.against.resolve(), processor), Side(here, processor)]
    print(f"{commit(given.against)} against {commit(here)}, one thread, {given.repeats} repeats\n")
    print("| work | seconds there | seconds here | there / here | least to greatest |")
    print("|---|---|---|---|---|")
    wanted = tuple(given.cases.split(";"))
    for case in CASES:
        if not case.startswith(wanted):
            continue
        rows = []
        for repeat in range(-1, given.repeats):
            order = sides if repeat % 2 else sides[::-1]
            found = {side: side.seconds(case) for side in order}
            rows.append([found[side] for side in sides])
        there, now = zip(*rows[1:], strict=True)
        ratios = [a / b for a, b in rows[1:]]
        print(
            f"| {case} | {statistics.median(there):.3f} | {statistics.median(now):.3f} | "
            f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
