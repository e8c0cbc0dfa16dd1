"""Tiny runs of every method, whose processes are killed at random, against runs that nobody disturbs.

Usage: PYTHONPATH=. python benchmarks/chaos.py OUT [--kills 104] [--seed 0] [--case NAME] [--backend ray|local]
One private Ray of three simulated nodes serves all runs: a head for drivers and learners, and two nodes for shards.
Each run has a driver process of its own with one or two shards; with `local` a run is the driver alone. OUT holds the
runs and a line of `results.jsonl` for each disturbed one; with the same OUT the command goes on where it was cut. A run
must end in the bits of one that nobody disturbed, in a single process, with no finished round repeated, every answer
paid once but for what was on its way at a kill, and nothing left behind. The table goes to stdout. What is killed:

shard, learner, gateway   SIGKILL of the actor's process
raylet                    SIGKILL of the daemon of a node with a shard, which takes the node along; a new one joins
driver                    SIGKILL, then `--resume`
disk                      learner, gateway and driver can make no file above 20 kB until the run fails; `--resume`
store                     the object store is filled by another program until the run ends
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import numpy as np
import yaml

from benchmarks.chaos_nodes import Nodes
from benchmarks.chaos_processes import ACTORS, Nursery, actors, alive, awaited
from ray_dfml.runtime.ray_environment import ray
from ray_dfml.runtime.shard import pin
from tests.runtime import toy
from tests.services.serving import counts

DISK_BYTES = 20_000


@dataclass(frozen=True)
class Case:
    """A method on a kind of pool."""

    name: str
    method: str
    pool: str
    """`open`, `closed`, `mixed` or `http`."""
    settings: tuple[str, ...]
    workers: int = 1

    def kinds(self, backend: str, turn: int, rng: Random) -> list[str]:
        """What is killed in a run: under Ray most of it without a new driver, which takes longest to start."""
        if backend == "local":
            return ["driver"] if self.method == "ota" else rng.sample(("driver", "driver", "driver", "disk"), 4)
        if self.method == "ota":  # it has one round
            return [("raylet", "disk", "learner", "driver", "shard", "store")[turn % 6]]
        asked = self.pool in ("closed", "mixed", "http")
        found = ["shard", "learner", "raylet", "raylet", "driver", "disk", "disk", "store"]
        found += ["gateway", "gateway"] if asked else ["shard", "learner"]
        rng.shuffle(found)
        return found


DISTILLER = ("method.budget=800", "method.batch=8", "method.student=conv4")
IDEAL = (*toy.IDEAL[1:-1], "method.budget=160")
SURROGATE = (
    "method.draws=turns", "method.surrogate.budget=500", "method.surrogate.student=mlp", "method.surrogate.last_steps=2"
)  # fmt: skip
CASES = (
    Case("free", "free", "open", (*toy.FREE, "method.rounds=24"), workers=2),
    Case("purer", "purer", "open", (*toy.PURER, "method.rounds=20")),
    Case("bidf-mkd", "bidf-mkd", "open", (*toy.BIDF, "method.rounds=16")),
    Case("dro", "dro", "open", (*toy.DRO, "method.rounds=20")),
    Case("ota", "ota", "open", ()),
    Case("no-pool", "no-pool", "open", (*toy.NO_POOL, "method.rounds=20")),
    Case("ideal, HTTP", "ideal", "http", IDEAL, workers=2),
    Case("ideal, local", "ideal", "closed", IDEAL),
    Case("dfme, HTTP", "dfme", "http", (*DISTILLER, "method.generator_steps=1", "method.student_steps=2")),
    Case("free, asked", "free", "mixed", (*toy.FREE, *SURROGATE, "method.rounds=20")),
    Case("bidf-mkd, asked", "bidf-mkd", "closed", (*toy.BIDF, "method.rounds=16", "method.zero_order.directions=4")),
)  # fmt: skip


@dataclass
class Watched:
    """The checkpoints of a run: how many rounds are done, and how often one was written a second time."""

    run: Path
    seen: dict[str, int] = field(default_factory=dict)
    repeated: int = 0

    def rounds(self) -> int:
        """Rounds that are done."""
        for file in self.run.glob("checkpoints/round-*.json"):
            try:
                time_ns = file.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            self.repeated += self.seen.get(file.name, time_ns) != time_ns
            self.seen[file.name] = time_ns
        return max((int(name[6:12]) for name in self.seen), default=0)


class Field:
    """Where the runs are: pools, a server, Ray, and what fills its store."""

    def __init__(self, out: Path, nursery: Nursery, nodes: Nodes) -> None:
        self.out, self.nursery, self.nodes = out, nursery, nodes
        self.url = ""

    def actors(self, *kinds: str) -> list[int]:
        """The processes of actors of some kinds, on all nodes."""
        return actors(self.nodes.raylets(), *kinds)

    def command(self, case: Case, run: Path, backend: str, *more: object) -> int:
        """The driver of a run."""
        words = [word for one in case.settings for word in ("--set", one)] if "--resume" not in more else []
        pool = ("--pool", self.out / case.pool) if "--resume" not in more else ()
        return self.nursery.start(
            run.with_suffix(".log"), "train", case.method, "--run-dir", run, *pool, *words, "--backend", backend,
            "--workers", case.workers, *more,
        )  # fmt: skip

    def reference(self, case: Case) -> Path:
        """The run that nobody disturbs, in one process."""
        run = self.out / f"{case.name.replace(', ', '-')}-reference"
        if not (run / "report.html").exists():
            driver = self.command(case, run, "local")
            awaited(f"{case.name}: the undisturbed run", lambda: not alive(driver))
            assert toy.status(run)["state"] == "done", run.with_suffix(".log").read_text()
        return run

    def fill(self, held: list[Any]) -> None:
        """Put arrays in the object store until it is full and spills."""
        size = self.nodes.store_bytes
        held += [ray.put(np.full(8 << 20, n, np.uint8)) for n in range(size // (8 << 20) + 2)]


def strike(where: Field, kind: str, driver: int, held: list[Any], rng: Random) -> bool:
    """Disturb a run. Returns whether there was something to disturb."""
    if kind == "store":
        where.fill(held)
        return alive(driver)
    if kind == "raylet":
        with_shard = [raylet for raylet in where.nodes.raylets() if actors([raylet], "shard")]
        if not with_shard or not alive(driver):
            return False
        where.nodes.replace(rng.choice(with_shard))
        return True
    if kind == "disk":
        for number in (*where.actors("learner", "gateway"), driver):
            try:
                resource.prlimit(number, resource.RLIMIT_FSIZE, (DISK_BYTES, resource.RLIM_INFINITY))
            except ProcessLookupError:
                return False
        return alive(driver)
    numbers = [driver] if kind == "driver" else where.actors(kind)
    if not numbers or not alive(driver):
        return False
    try:
        os.kill(rng.choice(numbers), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def disturbed(where: Field, case: Case, run: Path, backend: str, kinds: list[str], rng: Random) -> dict[str, Any]:
    """One run with a kill of each kind, each in another round. Returns what happened."""
    reference = where.reference(case)
    rows = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    pace = statistics.median(row["seconds/round"] for row in rows)
    watched, struck, began = Watched(run), Counter[str](), time.monotonic()
    received = counts(where.url)[0]
    driver = where.command(case, run, backend)
    held: list[Any] = []
    try:
        rounds = sorted(rng.sample(range(max(len(rows) - 4, 1)), min(len(kinds), max(len(rows) - 4, 1))))
        for r, kind in zip(rounds, kinds, strict=False):
            awaited(f"{run}: round {r}", partial(ready, where, watched, r, driver, backend))
            time.sleep(rng.uniform(0.0, pace))
            struck[kind] += strike(where, kind, driver, held, rng)
            if kind in ("driver", "disk"):
                driver = resumed(where, case, run, backend, watched, driver)
        finish(where, run, watched, driver)
    finally:
        held.clear()
    return {
        "case": case.name, "backend": backend, "run": run.name, "kills": dict(struck), "repeated": watched.repeated,
        "seconds": round(time.monotonic() - began, 1),
    } | judged(where, case, run, reference, sum(struck.values()), received)  # fmt: skip


def ready(where: Field, watched: Watched, rounds: int, driver: int, backend: str) -> bool:
    """Whether so many rounds are done and a learner is at work, or the driver has ended."""
    at_work = backend == "local" or where.actors("learner")
    return (watched.rounds() >= rounds and bool(at_work)) or not alive(driver)


def finish(where: Field, run: Path, watched: Watched, driver: int) -> None:
    """Wait until the driver has ended and its actors are gone."""
    while alive(driver):
        last = watched.rounds()
        ended = partial(lambda last: watched.rounds() > last or not alive(driver), last)
        awaited(f"{run}: stalls in round {last}", ended)
    awaited(f"{run}: actors are left", lambda: not where.actors(*ACTORS), 60)


def resumed(where: Field, case: Case, run: Path, backend: str, watched: Watched, driver: int) -> int:
    """The driver that goes on after one that was killed, or that failed as it had to."""
    finish(where, run, watched, driver)
    if not (run / "config.yaml").exists():
        return where.command(case, run, backend)
    return where.command(case, run, backend, "--resume")


def judged(where: Field, case: Case, run: Path, reference: Path, kills: int, received: int) -> dict[str, Any]:
    """Whether a run ended as the reference did, and what it left behind."""
    files = [{str(file.relative_to(one)) for file in one.rglob("*")} for one in (run, reference)]
    found: dict[str, Any] = {"files": sorted(files[0] ^ files[1])}
    log = run.with_suffix(".log").read_text()
    found["state"], found["tracebacks"] = toy.status(run)["state"], log.count("Traceback")
    try:
        toy.assert_equal(toy.last_state(run), toy.last_state(reference))
        weights = [sorted((f.name, f.read_bytes()) for f in one.rglob("*.safetensors")) for one in (run, reference)]
        found["equal"] = weights[0] == weights[1]
    except AssertionError as error:
        found |= {"equal": False, "difference": str(error)}
    if (asked := toy.status(run).get("queries")) is not None:
        wanted = toy.status(reference)["queries"]
        on_their_way = kills * (4 * 8 * 4 if case.pool == "http" else 4 * 500)
        lawful = asked["answered"] == wanted["answered"] <= asked["sent"] <= wanted["sent"] + on_their_way
        if case.pool == "http":
            lawful = lawful and asked["answered"] <= counts(where.url)[0] - received <= asked["sent"]
        found |= {"answered": asked["answered"], "sent": asked["sent"], "lawful": lawful}
    return found


def pools(out: Path) -> None:
    """Four teachers of small images, with weights, only asked, and mixed."""
    toy.write_images(out / "images")
    built = toy.build_pool(out / "open", f"folder:{out / 'images'}", models=4, way=2)
    for name, levels in (("closed", ("label", "probs", "logits", "label")), ("mixed", (None, None, "probs", "label"))):
        subprocess.run(["cp", "-r", built, out / name], check=True)
        content = yaml.safe_load((out / name / "pool.yaml").read_text())
        for entry, level in zip(content["teachers"], levels, strict=True):
            entry |= {} if level is None else {"access": level}
        (out / name / "pool.yaml").write_text(yaml.safe_dump(content))


def served(out: Path, nursery: Nursery) -> tuple[int, str]:
    """The process that serves the open pool's labels, and its address; the pool `http` has its services."""
    log = out / "serve.log"
    log.unlink(missing_ok=True)
    server = nursery.start(log, "serve", out / "open", "--access", "label", "--port", 0, "--json")
    url = json.loads(awaited("the server", lambda: log.exists() and log.read_text()).splitlines()[0])["url"]
    content = yaml.safe_load((out / "open" / "pool.yaml").read_text())
    keep = ("id", "input", "classes")
    for n, entry in enumerate(content["teachers"]):
        api = {"url": url, "adapter": "oip", "model": entry["id"], "output": "label", "batch": 8}
        content["teachers"][n] = {name: entry[name] for name in keep} | {"access": "label", "api": api}
    (out / "http").mkdir(exist_ok=True)
    (out / "http" / "pool.yaml").write_text(yaml.safe_dump(content))
    return server, url


def table(results: list[dict[str, Any]]) -> str:
    """The kills by method and kind, and how the runs ended."""
    kinds = ("shard", "learner", "driver", "gateway", "raylet", "disk", "store")
    columns = ("method", "backend", "runs", *kinds, "same bits", "rounds done twice", "files left", "queries lawful")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, backend in [*dict.fromkeys((one["case"], one["backend"]) for one in results), ("all", "")]:
        own = [one for one in results if name == "all" or (one["case"], one["backend"]) == (name, backend)]
        asked = [one for one in own if "lawful" in one]
        cells = [
            name, backend, len(own), *(sum(one["kills"].get(kind, 0) for one in own) for kind in kinds),
            f"{sum(one['equal'] for one in own)} of {len(own)}", sum(one["repeated"] for one in own),
            sum(len(one["files"]) for one in own),
            f"{sum(one['lawful'] for one in asked)} of {len(asked)}" if asked else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Disturb runs, one case after another, until there are enough kills."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path)
    options.add_argument("--kills", type=int, default=104, help="disturbances of all kinds with this backend")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--case", choices=[case.name for case in CASES], help="only this one")
    options.add_argument("--backend", choices=["ray", "local"], default="ray")
    given = options.parse_args()
    out = given.out.resolve()
    os.environ["RAY_DFML_CACHE"] = str(out / "cache")
    pin()
    if not (out / "mixed" / "pool.yaml").exists():
        out.mkdir(parents=True, exist_ok=True)
        pools(out)
    nodes = Nodes()
    os.environ["RAY_ADDRESS"] = nodes.address
    nursery = Nursery()
    where = Field(out, nursery, nodes)
    server, where.url = served(out, nursery)
    cases = [case for case in CASES if given.case in (None, case.name)]
    log = out / "results.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    try:
        number = 0
        while sum(sum(one["kills"].values()) for one in results if one["backend"] == given.backend) < given.kills:
            case = cases[number % len(cases)]
            turn, name = number // len(cases), f"{case.name.replace(', ', '-')}-{given.backend}-{number}"
            number += 1
            if any(one["run"] == name for one in results):
                continue
            subprocess.run(["rm", "-rf", out / name, out / f"{name}.log", out / f"{name}.log.codes"], check=True)
            rng = Random(f"{given.seed} {name}")
            kinds = case.kinds(given.backend, turn, rng)
            results.append(disturbed(where, case, out / name, given.backend, kinds, rng))
            with log.open("a") as handle:
                print(json.dumps(results[-1]), file=handle)
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    finally:
        nursery.close()
        os.kill(server, signal.SIGTERM)
        nodes.close()
    print(table(results))


if __name__ == "__main__":
    main()
