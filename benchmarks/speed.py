"""Local against one shard against two, same work, same bits: seconds of recover + grad, whole rounds, driver share.

Usage: python benchmarks/speed.py POOL OUT [--rounds N] [--repeats N]     (POOL: Conv4 teachers, such as
benchmarks/methods.py builds)

Each repeat runs `ray-dfml train free --preset characters` three times, in turn, on the same pool. Prints one JSON
object.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

KINDS = {
    "local": ["--backend", "local"],
    "1 shard": ["--backend", "ray", "--workers", "1"],
    "2 shards": ["--backend", "ray", "--workers", "2"],
}


def one(pool: Path, run: Path, where: list[str], rounds: int) -> dict[str, float | str]:
    """Train once; sums over the learning rounds but the first, which warms up."""
    settings = [
        f"method.rounds={rounds}",
        "method.warmup=1",
        "method.replay.patience=100",
        "method.replay.max_updates=10",
    ]
    command = [sys.executable, "-m", "ray_dfml", "train", "free", "--preset", "characters", "--pool", str(pool)]
    command += ["--run-dir", str(run), *where, *(word for s in settings for word in ("--set", s))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    given = parser.parse_args()
    found: dict[str, list] = {kind: [] for kind in KINDS}
    for repeat in range(given.repeats):
        for kind, where in KINDS.items():
            found[kind].append(one(given.pool, given.out / f"{kind.replace(' ', '-')}-{repeat}", where, given.rounds))
            print(kind, repeat, found[kind][-1], file=sys.stderr, flush=True)

    def work(kind: str, *parts: str) -> float:
        return statistics.median(sum(row[part] for part in parts) for row in found[kind])

    print(
        json.dumps(
            {
                "seconds": {
                    kind: {p: work(kind, p) for p in ("recover", "grad", "learner", "round")} for kind in KINDS
                },
                "one shard / local, whole rounds": work("1 shard", "round") / work("local", "round"),
                "one shard / two shards, recover + grad": work("1 shard", "recover", "grad")
                / work("2 shards", "recover", "grad"),
                "driver share, two shards": work("2 shards", "driver_share"),
                "same bits": len({row["sha256"] for rows in found.values() for row in rows}) == 1,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
