"""Local against one shard against two, same work, same bits: seconds of recover + grad, whole rounds, driver share.

Usage: python benchmarks/speed.py POOL OUT [--rounds N] [--repeats N] [--against TREE]     (POOL: Conv4 teachers, such
as benchmarks/methods.py builds)

Each repeat runs `ray-dfml train free --preset characters` three times, in turn, on the same pool. With `--against`, a
checkout of another commit does the same in turn with this tree. Prints one JSON object.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

KINDS = {
    "local": ["--backend", "local"],
    "1 shard": ["--backend", "ray", "--workers", "1"],
    "2 shards": ["--backend", "ray", "--workers", "2"],
}


def one(tree: Path, pool: Path, run: Path, where: list[str], rounds: int) -> dict[str, float | str]:
    """Train once with the package in `tree`; sums over the learning rounds but the first, which warms up."""
    settings = [
        f"method.rounds={rounds}",
        "method.warmup=1",
        "method.replay.patience=100",
        "method.replay.max_updates=10",
    ]
    command = [sys.executable, "-m", "ray_dfml", "train", "free", "--preset", "characters", "--pool", str(pool)]
    command += ["--run-dir", str(run), *where, *(word for s in settings for word in ("--set", s))]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=tree)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
    return {
        "recover": sum(row["seconds/free.recover"] for row in rows),
        "grad": sum(row["seconds/maml.grad"] for row in rows),
        "learner": sum(row["seconds/learner"] for row in rows),
        "round": sum(row["seconds/round"] for row in rows),
        "driver_share": json.loads((run / "status.json").read_text())["driver_share"],
        "sha256": hashlib.sha256((run / "learner.safetensors").read_bytes()).hexdigest(),
    }


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--against", type=Path, help="a checkout of another commit")
    given = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    trees = {"here": here} | ({"there": given.against.resolve()} if given.against else {})
    pool, out = given.pool.resolve(), given.out.resolve()
    found: dict[tuple[str, str], list] = {(side, kind): [] for kind in KINDS for side in trees}
    for repeat in range(given.repeats):
        for side, kind in found:
            run = out / f"{side}-{kind.replace(' ', '-')}-{repeat}"
            found[side, kind].append(one(trees[side], pool, run, KINDS[kind], given.rounds))
            print(side, kind, repeat, found[side, kind][-1], file=sys.stderr, flush=True)

    def work(side: str, kind: str, *parts: str) -> float:
        return statistics.median(sum(row[part] for part in parts) for row in found[side, kind])

    shown: dict[str, Any] = {}
    for side in trees:
        shown[side] = {
            "seconds": {
                kind: {p: work(side, kind, p) for p in ("recover", "grad", "learner", "round")} for kind in KINDS
            },
            "one shard / local, whole rounds": work(side, "1 shard", "round") / work(side, "local", "round"),
            "one shard / two shards, recover + grad": work(side, "1 shard", "recover", "grad")
            / work(side, "2 shards", "recover", "grad"),
            "driver share, two shards": work(side, "2 shards", "driver_share"),
            "same bits": len({row["sha256"] for (at, _), rows in found.items() if at == side for row in rows}) == 1,
        }
    if given.against:
        shown["there / here, whole rounds"] = {k: work("there", k, "round") / work("here", k, "round") for k in KINDS}
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()
