"""A simulation, not a measurement: FREE on 10,000 ResNet-18 teachers and 64 GPUs. Bytes, seconds, and where it breaks.

Usage: PYTHONPATH=. python benchmarks/scale_simulated.py OUT/scale.json
Discrete events of one round after another: the learner cuts the round into chunks with the function that runs use
(`runtime/balance.py:chunks`) and sends each at a cost; a shard reads what its cache of 512 MiB
lacks from one shared storage, checks it, recovers, and sends back images and meta-gradients through the network card of
the learner's node; the learner adds them up, replays, and writes a checkpoint. Storage and card serve one transfer at a
time, at their bandwidth. What Ray and the manifest cost comes from a run of `scale.py`; what it costs to check a file
and to add up gradients is measured when this starts. No GPU was measured: seconds of recovery are rows of the table.
"""

import argparse
import hashlib
import heapq
import json
import statistics
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from benchmarks.scale_show import table
from ray_dfml.core.generators import generator
from ray_dfml.core.net import net
from ray_dfml.data import weights_file
from ray_dfml.methods.free.config import Config
from ray_dfml.runtime.balance import chunks
from ray_dfml.runtime.shard import CACHE_BYTES, pin
from ray_dfml.types import Job

SHAPE, WAY = (3, 32, 32), 5
TASK_SECONDS = 0.05
"""Assumed: one task of replay on a GPU."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A cluster and a run. Bandwidths are bytes a second."""

    teachers: int = 10_000
    gpus: int = 64
    nodes: int = 8
    per_round: int = 64
    recovery: float = 2.0
    """Seconds of one recovery on a GPU: assumed."""
    storage: float = 5e9
    """Assumed: of the shared storage, for all nodes together."""
    card: float = 25e9 / 8
    """Assumed: of a node's network card, 25 Gbit/s."""
    updates: int = 20
    """Assumed: updates of a replay until the plateau."""
    dispatch: float
    """Measured: Ray's seconds for a chunk."""
    check: float
    """Measured: seconds to hash, parse and check a byte of a teacher."""
    add: float
    """Measured: seconds to read and add up a byte of a gradient."""


@dataclass(frozen=True)
class Round:
    """What a round took, in seconds and bytes."""

    recover: float
    collect: float
    replay: float
    checkpoint: float
    busy: float
    """Share of the time of all GPUs in which they recover, of the whole round."""
    storage_bytes: float
    card_bytes: float

    @property
    def seconds(self) -> float:
        """Of the whole round."""
        return self.recover + self.collect + self.replay + self.checkpoint


class Line:
    """Serves one transfer after another."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth, self.free, self.carried = bandwidth, 0.0, 0.0

    def carry(self, now: float, size: float) -> float:
        """When a transfer of so many bytes ends that is asked for now."""
        self.free = max(now, self.free) + size / self.bandwidth
        self.carried += size
        return self.free


class Simulation:
    """A run of FREE, round after round. The caches of the shards last."""

    def __init__(self, world: World) -> None:
        self.world, self.rng = world, Random(0)
        self.caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(world.gpus)]
        teacher, cfg = net("resnet18", SHAPE, WAY), Config()
        self.teacher = 4 * (teacher.layout.numel + teacher.stats_layout.numel)
        self.learner = 4 * net("conv4", SHAPE, WAY).layout.numel
        self.generator = 4 * generator(SHAPE, cfg.latent, cfg.width).layout.numel
        self.images = cfg.images_per_class * WAY * int(np.prod(SHAPE))
        self.tasks = cfg.replay.tasks

    def _hosted(self, shard: int, teacher: int) -> bool:
        """Whether a shard has a teacher; it has it from now on."""
        cache = self.caches[shard]
        found = teacher in cache
        cache[teacher] = None
        cache.move_to_end(teacher)
        while len(cache) * self.teacher > CACHE_BYTES:
            cache.popitem(last=False)
        return found

    def _shard(self, shard: int, waiting: deque[list[Job]], lines: "Lines") -> Iterator[tuple[Line | None, float]]:
        """What a shard does: it yields a line and bytes to carry, or None and seconds of its own."""
        while waiting:
            chunk = waiting.popleft()
            yield lines.dispatcher, 1.0
            for job in chunk:
                if not self._hosted(shard, int(job.teacher or 0)):
                    yield lines.storage, self.teacher
                    yield None, self.teacher * self.world.check
            yield None, self.world.recovery * len(chunk)
            yield lines.card, len(chunk) * (self.images + self.generator)

    def round(self) -> Round:
        """One round."""
        w = self.world
        lines = Lines(Line(w.storage), Line(w.card), Line(1 / w.dispatch))
        jobs = [
            Job(index=j, seed=j, teacher=str(self.rng.randrange(w.teachers)), memory=self.teacher)
            for j in range(w.per_round)
        ]
        waiting = deque(chunks(jobs, w.gpus, CACHE_BYTES))
        begun = last = lines.card.carry(0.0, (w.nodes - 1) * (self.generator + self.learner))
        events = [(begun, i, self._shard(i, waiting, lines)) for i in range(w.gpus)]
        while events:
            now, i, shard = heapq.heappop(events)
            for line, size in islice(shard, 1):
                done = line.carry(now, size) if line else now + size
                last = max(last, done)
                # what a shard sends back does not keep it from its next chunk
                heapq.heappush(events, (now if line is lines.card else done, i, shard))
        collect = w.per_round * (self.images + self.generator) * w.add
        update = self.tasks * w.dispatch + -(-self.tasks // w.gpus) * TASK_SECONDS
        update += (w.nodes - 1) * self.learner / w.card
        state = 3 * (self.learner + self.generator) + w.per_round * self.images
        whole = Round(
            last, collect, w.updates * update, state / w.storage, 0.0, lines.storage.carried, lines.card.carried
        )
        return replace(whole, busy=w.recovery * w.per_round / (w.gpus * whole.seconds))


@dataclass(frozen=True)
class Lines:
    """What the shards of a round share."""

    storage: Line
    card: Line
    dispatcher: Line
    """Its unit is a chunk."""


def timed(work: Callable[[], object]) -> float:
    """Median processor seconds of five calls."""
    spent = []
    for _ in range(5):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return statistics.median(spent)


def check_cost() -> float:
    """Processor seconds to hash, parse and check a byte of a teacher."""
    network = net("resnet18", SHAPE, WAY)
    tensors = network.layout.unflatten(network.init(torch.Generator().manual_seed(0)))
    data = weights_file.to_safetensors(tensors | network.stats_layout.unflatten(network.initial_stats()))

    def check() -> None:
        hashlib.sha256(data).hexdigest()
        weights_file.check_values(weights_file.from_safetensors(data))

    return timed(check) / len(data)


def add_cost() -> float:
    """Processor seconds to copy a byte of a gradient and to add it up."""
    gradient, total = np.ones(2_500_000, np.float32), torch.zeros(2_500_000)
    return timed(lambda: total.add_(torch.tensor(gradient))) / gradient.nbytes


HEAD = (
    "recover s", "add up s", "replay s", "checkpoint s", "round s", "GPUs recover %", "storage GB", "card GB",
    "10,000 teachers h",
)  # fmt: skip
CHANGES: tuple[dict[str, Any], ...] = (
    {}, {"storage": 1e9}, {"card": 10e9 / 8}, {"card": 100e9 / 8}, {"gpus": 8, "nodes": 1}, {"gpus": 256, "nodes": 32},
)  # fmt: skip


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("measured", type=Path, help="scale.json")
    given = options.parse_args()
    pin()
    found = json.loads(given.measured.read_text())
    most = max(found["overhead"], key=int)
    dispatch = statistics.median(found["overhead"][most]) / int(most)
    small, large = (found["runs"][n]["cpu, inputs"] for n in (min(found["runs"], key=int), max(found["runs"], key=int)))
    slope = (large - small) / (max(map(int, found["runs"])) - min(map(int, found["runs"])))
    base = World(dispatch=dispatch, check=check_cost(), add=add_cost())
    one = Simulation(base)
    print(f"measured: dispatch {1000 * dispatch:.2f} ms a chunk; check {base.check * 1e9:.2f} s and adding up")
    print(f"{base.add * 1e9:.2f} s a GB; reading a manifest and small weights {1000 * slope:.2f} ms a teacher")
    print(f"teacher {one.teacher / 1e6:.1f} MB, pool {base.teachers * one.teacher / 1e9:.0f} GB")
    print(f"generator {one.generator / 1e6:.1f} MB, recovered task {one.images / 1e6:.2f} MB\n")
    rows = []
    for recovery in (0.5, 2.0, 8.0):
        for per_round in (64, 640):
            for updates in (20, 50):
                world = replace(base, recovery=recovery, per_round=per_round, updates=updates)
                rows.append([f"{recovery:g}", f"{per_round}", f"{updates}", *cells(world)])
    head = ["recovery s", "teachers a round", "updates", *HEAD]
    print(table(head, rows), "\n")
    rows = []
    for change in CHANGES:
        world = replace(base, per_round=640, **change)
        rows.append([", ".join(f"{key} {value:g}" for key, value in change.items()) or "as above", *cells(world)])
    print(table(["640 teachers a round of 2 s, 20 updates", *HEAD], rows))


def cells(world: World) -> list[str]:
    """The median of ten rounds, and hours until as many teachers were visited as the pool has."""
    simulation = Simulation(world)
    rounds = [simulation.round() for _ in range(10)]
    middle = sorted(rounds, key=lambda one: one.seconds)[5]
    hours = world.teachers / world.per_round * middle.seconds / 3600
    times = (middle.recover, middle.collect, middle.replay, middle.checkpoint, middle.seconds)
    sizes = (middle.storage_bytes / 1e9, middle.card_bytes / 1e9, hours)
    return [*(f"{one:.2f}" for one in times), f"{100 * middle.busy:.0f}", *(f"{one:.2f}" for one in sizes)]


if __name__ == "__main__":
    sys.exit(main())
