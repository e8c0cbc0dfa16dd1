"""Queries through client, ledger and server on loopback: images a second, and the ledger's share of the time.

Usage: python benchmarks/services.py OUT [--images 25000] [--batch 250] [--arch lenet] [--repeats 5]
A teacher with random weights is served by `ray-dfml serve` with labels only, and asked about images of noise, in JSON
and in binary tensors, with one request at a time and with four. Each run is done with the ledger and with one that only
keeps answers in memory, in turn; the difference is the ledger's. The milliseconds are of the processor, for a batch.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ray_dfml.core import seeds
from ray_dfml.core.net import net
from ray_dfml.data.pool import Pool
from ray_dfml.data.services import Api, Asked
from ray_dfml.services.gateway import Gateway
from ray_dfml.types import ImageSpec, TeacherCard

IMAGE = ImageSpec(channels=1, height=28, width=28, mean=(0.0,), std=(1.0,))
CLASSES = tuple(f"noise/{i}" for i in range(10))


def build(folder: Path, arch: str) -> None:
    """A pool of one teacher with random weights."""
    network = net(arch, IMAGE.shape, len(CLASSES))
    theta = network.init(seeds.rng(0, "benchmark"))
    tensors = network.layout.unflatten(theta) | network.stats_layout.unflatten(network.initial_stats())
    Pool.create(folder).add("t", tensors, arch=arch, image=IMAGE, classes=CLASSES, accuracy=None, source="noise")


@contextlib.contextmanager
def served(pool: Path) -> Iterator[tuple[str, int]]:
    """A server in a process of its own; yields its address and its process id."""
    argv = [sys.executable, "-m", "ray_dfml", "serve", f"{pool}:t", "--access", "label", "--port", "0", "--json"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"], process.pid
    finally:
        process.terminate()
        process.wait()


class Nothing:
    """A ledger that keeps answers in memory, and neither counts, nor bounds, nor writes."""

    def __init__(self) -> None:
        self.known: dict[bytes, Any] = {}
        self.open: list[list[bytes]] = []

    def missing(self, hashes: list[bytes]) -> np.ndarray:
        """Positions of the hashes without an answer."""
        return np.array([place for place, one in enumerate(hashes) if one not in self.known], np.int64)

    def check(self, teacher: str, images: int) -> None:
        """Allow all."""

    def together(self, acts: list[Callable[[], Any]]) -> list[Any]:
        """Do all."""
        return [act() for act in acts]

    def grant(self, teacher: str, hashes: list[bytes]) -> int:
        """Give an id."""
        self.open.append(hashes)
        return len(self.open)

    def settle(self, id: int, answers: np.ndarray) -> None:
        """Keep the answers."""
        self.known.update(zip(self.open[id - 1], answers, strict=True))

    def answers(self, hashes: list[bytes]) -> np.ndarray:
        """The answers."""
        return np.array([self.known[one] for one in hashes])


def processor(pid: int) -> float:
    """Processor seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Run(NamedTuple):
    """Seconds of asking about all images once: on the clock, and of the processor, here and in the server."""

    clock: float
    here: float
    there: float


def run(file: Path, server: tuple[str, int], images: np.ndarray, asked: Asked, *, ledger: bool) -> Run:
    """Ask about all images but the first, which tries the service, with a new ledger or with none."""
    with Gateway(file, [asked]) as gateway:
        gateway.ask("t", images[:1])
        real = gateway._ledger
        if not ledger:
            gateway._ledger = Nothing()  # pyright: ignore[reportAttributeAccessIssue]
        start, here, there = time.perf_counter(), time.process_time(), processor(server[1])
        gateway.ask("t", images[1:])
        took = Run(time.perf_counter() - start, time.process_time() - here, processor(server[1]) - there)
        gateway._ledger = real
    return took


def measure(folder: Path, server: tuple[str, int], images: np.ndarray, args: argparse.Namespace, binary: str,
            requests: int) -> dict[str, str]:  # fmt: skip
    """Ask with a ledger and with none in turn. Medians over the pairs."""
    api = {"url": server[0], "adapter": "oip", "model": "t", "output": "label", "binary": binary}
    card = TeacherCard(id="t", arch="", image=IMAGE, classes=CLASSES, access="label")
    asked = Asked(card=card, api=Api.model_validate(api | {"concurrency": requests, "batch": args.batch}))
    pairs: list[dict[bool, Run]] = []
    for i in range(args.repeats):
        order = (True, False) if i % 2 else (False, True)
        name = f"{binary}-{requests}-{i}"
        pairs.append({x: run(folder / f"{name}-{x}.sqlite", server, images, asked, ledger=x) for x in order})
    batches = len(images) / args.batch
    more = [pair[True].here - pair[False].here for pair in pairs]
    work = [extra / (pair[True].here + pair[True].there) for extra, pair in zip(more, pairs, strict=True)]
    clock = [1 - pair[False].clock / pair[True].clock for pair in pairs]

    def a_batch(values: list[float]) -> str:
        return f"{1000 * statistics.median(values) / batches:.2f}"

    return {
        "tensors": "binary" if binary == "on" else "JSON",
        "requests at a time": str(requests),
        "images/s": f"{len(images) / statistics.median([pair[True].clock for pair in pairs]):.0f}",
        "client, ms": a_batch([pair[False].here for pair in pairs]),
        "ledger, ms": a_batch(more),
        "server, ms": a_batch([pair[True].there for pair in pairs]),
        "ledger's share of the work": f"{statistics.median(work):.1%}",
        "of the clock": f"{statistics.median(clock):.1%} ({min(clock):.1%} to {max(clock):.1%})",
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--arch", default="lenet")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    build(args.out / "pool", args.arch)
    images = np.random.default_rng(0).integers(0, 256, (args.images, *IMAGE.shape), np.uint8)
    rows = []
    for binary in ("on", "off"):
        for concurrency in (1, 4):
            with served(args.out / "pool") as server:
                rows.append(measure(args.out, server, images, args, binary, concurrency))
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
