"""Runs on pools of 1 to 1,000 teachers over eight simulated nodes: memory, traffic, rounds, start-up, Ray's overhead.

Usage: PYTHONPATH=. python benchmarks/scale.py OUT [--teachers 1 10 100 1000] [--nodes 8] [--rounds 24]
Each node is a raylet of its own on this machine, with one processor and one shard; drivers and learners are on the
first one. For each pool `ray-dfml train free` runs as a user would start it, on the disk that all nodes see, with eight
teachers a round, and is watched from outside: private memory of its processes from /proc, what the driver's sockets
carried from `ss`, the time of rounds and their parts from its log. Teachers are small Conv4 with random weights, since
nothing here depends on what they know. Then four learners over the same shards, whose rounds take turns, so that
their times can be compared on a machine that does other work too, and the same in one process, for its processor time;
and Ray's overhead, of rounds of so many jobs that compute nothing.

OUT gets `scale.json`; a picture goes to OUT/scale.png, and the tables to stdout. Exit code 1 if the memory of driver or
learner grows by more than a tenth from 100 to 1,000 teachers.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_dfml.runtime.ray_environment import ray  # first, since it sets what Ray reads when it is imported

import numpy as np  # isort: skip
from ray.cluster_utils import Cluster  # isort: skip

from benchmarks.chaos_processes import actors, awaited
from benchmarks.scale_show import plot, tables
from ray_dfml.config import resolve
from ray_dfml.core import seeds
from ray_dfml.core.net import net
from ray_dfml.data.pool import Pool
from ray_dfml.runtime import driver
from ray_dfml.runtime.cluster import Cluster as RunCluster
from ray_dfml.runtime.dispatch import RayBackend, ShardActor
from ray_dfml.runtime.driver import Machine, Session
from ray_dfml.runtime.learning import CHECKPOINTS
from ray_dfml.runtime.local import no_teachers
from ray_dfml.runtime.shard import pin
from ray_dfml.types import Arrays, ImageSpec, Job
from tests.runtime import toy

STORE_BYTES = 100 * 2**20
"""Object store of a node."""
IMAGE = ImageSpec(channels=1, height=16, width=16, mean=(0.5,), std=(0.25,))
SETTINGS = (
    *toy.FREE, "method.teachers_per_round=8", "method.warmup=2", "eval.episodes=20", "eval.val_episodes=10",
    "eval.query=3", "eval.shots=[1]", "eval.steps=3", "eval.every=1000",
)  # fmt: skip
TICK_SECONDS = 0.2
REPEATS = 7
GROWTH = 0.1


class Usage:
    """What a process has used: private memory now, its peak, processor time, and bytes that it read from files."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def private(self) -> int:
        """Bytes of memory that no other process shares."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return 1024 * sum(int(n) for n in re.findall(r"^Private_(?:Clean|Dirty): +(\d+)", text, re.MULTILINE))

    def cpu(self) -> float:
        """Seconds of processor time."""
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def read(self) -> int:
        """Bytes that it read from files, whether or not they were cached."""
        return int(Path(f"/proc/{self.pid}/io").read_text().split()[1])


def sockets(pid: int) -> dict[str, tuple[int, int]]:
    """Each TCP connection of a process -> bytes sent and received so far."""
    lines = subprocess.run(["ss", "-tinpOH"], capture_output=True, text=True, check=True).stdout.splitlines()
    found = {}
    for line in lines:
        if f"pid={pid}," in line:
            counts = [re.search(rf"bytes_{kind}:(\d+)", line) for kind in ("sent", "received")]
            name = " ".join(line.split()[3:5])
            found[name] = (int(counts[0][1]) if counts[0] else 0, int(counts[1][1]) if counts[1] else 0)
    return found


def pool_of(path: Path, teachers: int) -> Path:
    """A pool of teachers with random weights, each of two of the toy classes."""
    if not path.exists():
        network, pool = net("conv4", IMAGE.shape, 2), Pool.create(path)
        for i in range(teachers):
            weights = network.layout.unflatten(network.init(seeds.rng(0, "scale", i)))
            weights |= network.stats_layout.unflatten(network.initial_stats())
            classes = [f"images/train{(i + k) % toy.CLASSES['train']:02d}" for k in range(2)]
            pool.add(
                f"t-{i:05d}", weights, arch="conv4", image=IMAGE, classes=classes, accuracy=None, source="scale.py"
            )
    return path


def watched(run: Path, pool: Path, nodes: int, rounds: int, raylets: Sequence[int]) -> dict[str, Any]:
    """Train on a pool, and watch the processes. Returns what they used."""
    began = time.time()
    command = started(run, pool, nodes, rounds)
    usage, found, carried = Usage(command.pid), {}, {}
    memory: dict[str, list[int]] = {"driver": [], "learner": [], "shard": []}
    learner_cpu: list[tuple[int, float, float]] = []
    while command.poll() is None:
        with contextlib.suppress(OSError):  # a process has ended
            if "cpu, inputs" not in found and (run / "config.yaml").exists():
                found |= {"cpu, inputs": usage.cpu(), "bytes read, inputs": usage.read()}
                found["seconds, inputs"] = (run / "config.yaml").stat().st_mtime - began
            done = count_lines(run / "metrics.jsonl")
            if done and "cpu, first round" not in found:
                found |= {"cpu, first round": usage.cpu(), "seconds, first round": time.time() - began}
            if 2 <= done < rounds:
                learners, shards = (actors(raylets, kind) for kind in ("learner", "shard"))
                memory["driver"].append(usage.private())
                memory["learner"] += [Usage(pid).private() for pid in learners]
                memory["shard"] += [Usage(pid).private() for pid in shards[:1]]
                learner_cpu += [(done, Usage(pid).cpu(), usage.cpu()) for pid in learners]
            carried |= sockets(command.pid)
        time.sleep(TICK_SECONDS)
    if command.returncode:
        raise RuntimeError(run.with_suffix(".log").read_text())
    awaited(f"{run}: actors are left", lambda: not actors(raylets, "learner", "shard"), 60)
    (first, *cpu_first), (last, *cpu_last) = learner_cpu[0], learner_cpu[-1]
    for name, a, b in zip(("learner", "driver"), cpu_first, cpu_last, strict=True):
        found[f"cpu a round, {name}"] = (b - a) / max(last - first, 1)
    return found | {
        "memory": {name: statistics.median(values) for name, values in memory.items()},
        "sent": sum(sent for sent, _ in carried.values()),
        "received": sum(received for _, received in carried.values()),
        "round": parts(rows_of(run)),
        "driver share": json.loads((run / "status.json").read_text()).get("driver_share"),
        "actors": nodes + 1,
    }


def started(run: Path, pool: Path, workers: int, rounds: int) -> "subprocess.Popen[bytes]":
    """The command that trains on a pool."""
    words = ["train", "free", "--pool", pool, "--data", f"folder:{pool.parent / 'images'}", "--run-dir", run]
    words += ["--workers", workers]
    words += [word for one in (*SETTINGS, f"method.rounds={rounds}") for word in ("--set", one)]
    subprocess.run(["rm", "-rf", run], check=True)
    with run.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ray_dfml", *map(str, words)], stdout=log, stderr=subprocess.STDOUT
        )


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of the rounds of a run, without the first two."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]


def parts(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of rounds and of their parts."""
    keys = [key for key in rows[0] if key.startswith("seconds/")]
    return {key.partition("/")[2]: statistics.median(row.get(key, 0.0) for row in rows) for key in keys}


def count_lines(file: Path) -> int:
    """Lines of a file; none if it is not there."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


class IdleShard(ShardActor):
    """A shard that computes nothing."""

    def run(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """An empty result for each job."""
        return [{} for _ in jobs]


def overheads(counts: Sequence[int], nodes: int) -> dict[int, list[float]]:
    """Seconds of rounds of so many jobs that compute nothing, with the learner's weights as shared values."""
    shard = ray.remote(num_cpus=1)(IdleShard)
    shards: list[Any] = [shard.remote(device=None) for _ in range(nodes)]
    backend = RayBackend(shards, ray.put((no_teachers, None)), batched=False)
    shared: Arrays = {"theta": np.zeros(net("conv4", IMAGE.shape, 2).layout.numel, np.float32)}
    found = {}
    try:
        for count in counts:
            jobs = [Job(index=i, seed=i, teacher=f"t-{i:05d}") for i in range(count)]
            backend.map("idle", jobs, shared)
            found[count] = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                backend.map("idle", jobs, shared)
                found[count].append(time.perf_counter() - began)
    finally:
        for one in shards:
            ray.kill(one)
    return found


def in_turn(
    out: Path, counts: Sequence[int], rounds: int, machine: Machine, cluster: RunCluster | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The metrics of rounds by pool, with the processor seconds of this process; the pools take turns.

    Whatever else the machine does, it does to all of them alike. The first two rounds are left out.
    """
    sessions: dict[int, Session] = {}
    found: dict[str, list[dict[str, Any]]] = {str(n): [] for n in counts}
    try:
        for n in counts:
            pool, data = (str(out / f"pool-{n}"),), (f"folder:{out / 'images'}",)
            config = resolve("free", settings=[*SETTINGS, f"method.rounds={rounds}"], pool=pool, data=data)
            folder = out / f"turn-{n}"
            subprocess.run(["rm", "-rf", folder], check=True)
            (folder / CHECKPOINTS).mkdir(parents=True)
            sessions[n] = machine.session(config, driver.read_inputs(config), folder, cluster)
            sessions[n].start()
        for r in range(rounds):
            for n, session in sessions.items():
                began = time.process_time()
                row = {"round": r} | session.call("round", r)
                session.save(r + 1, row)
                if r >= 2:
                    found[str(n)].append(row | {"processor": time.process_time() - began})
    finally:
        for session in sessions.values():
            session.close()
    return found


def main() -> int:
    """Measure everything. Returns the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path)
    options.add_argument("--teachers", type=int, nargs="+", default=[1, 10, 100, 1000])
    options.add_argument("--nodes", type=int, default=8)
    options.add_argument("--rounds", type=int, default=24)
    given = options.parse_args()
    out = given.out.resolve()
    os.environ["RAY_DFML_CACHE"] = str(out / "cache")
    pin()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "images").exists():
        toy.write_images(out / "images")
    results: dict[str, Any] = {"nodes": given.nodes, "runs": {}, "overhead": {}}
    for n in given.teachers:
        began = time.perf_counter()
        pool_of(out / f"pool-{n}", n)
        print(f"pool of {n}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    began = time.perf_counter()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES},
    )
    try:
        for n in range(1, given.nodes):
            cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{n + 1}", object_store_memory=STORE_BYTES)
        os.environ["RAY_ADDRESS"] = cluster.address
        print(f"{given.nodes} nodes: {time.perf_counter() - began:.1f} s", file=sys.stderr)
        raylets = [one.all_processes["raylet"][0].process.pid for one in (cluster.head_node, *cluster.worker_nodes)]
        for n in given.teachers:
            results["runs"][str(n)] = watched(out / f"run-{n}", out / f"pool-{n}", given.nodes, given.rounds, raylets)
            print(json.dumps({n: results["runs"][str(n)]}), file=sys.stderr, flush=True)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        with Machine(workers=given.nodes).cluster(STORE_BYTES) as shards:
            rows = in_turn(out, given.teachers, given.rounds, Machine(workers=given.nodes), shards)
        results["in turn"] = {n: parts(found) for n, found in rows.items()}
        results["overhead"] = {str(n): times for n, times in overheads(given.teachers, given.nodes).items()}
        ray.shutdown()
    finally:
        cluster.shutdown()
    alone = in_turn(out, given.teachers, given.rounds, toy.LOCAL)
    results["processor"] = {n: [row["processor"] for row in found] for n, found in alone.items()}
    (out / "scale.json").write_text(json.dumps(results, indent=1))
    print(tables(results))
    plot(results, out / "scale.png")
    return grown(results)


def grown(results: dict[str, Any]) -> int:
    """Print how much memory grew from 100 teachers to the largest pool. Returns 1 if it is more than a tenth."""
    runs = results["runs"]
    if "100" not in runs:
        return 0
    last, code = max(runs, key=int), 0
    for who in ("driver", "learner"):
        growth = runs[last]["memory"][who] / runs["100"]["memory"][who] - 1
        print(f"memory of the {who} from 100 to {int(last):,} teachers: {100 * growth:+.1f} %")
        code |= growth > GROWTH
    return code


if __name__ == "__main__":
    sys.exit(main())
