"""Whole runs of many batches against `ray-dfml serve` while answers are spoilt and processes are killed at random.

Usage: PYTHONPATH=. python benchmarks/faults.py POOL OUT [--seeds 5] [--images 10000] [--batch 50]
The first teacher of POOL is served and asked through the gateway; `tests/services/chaos.py` says what happens on the
way. A run ends with an AssertionError where a law does not hold to the image or an answer has other bits than the
teacher's. OUT is a new folder for ledgers and counts; the table goes to stdout.
"""

import argparse
from pathlib import Path

from tests.services.chaos import FAULTS, Counted, disturbed, disturbed_training, nursery

SETTINGS = (
    "method.budget=800", "method.batch=50", "method.first=50", "method.growth=0", "method.student=lenet",
    "method.steps=1", "method.last_steps=20", "method.images=[dip,mutants]",
)  # fmt: skip
"""Of the trainings: sixteen rounds of one batch."""
RATE = 0.3
"""Share of requests that are spoilt."""
COLUMNS = ("seed", "kills of the asker", "requests", "spoilt", "sent", "proxy", "received", "unique", "answered", "s")


def row(seed: int, found: Counted) -> str:
    """A line of the table."""
    requests = sum(found.faults.values())
    cells = (
        seed, found.client_kills, requests, requests - found.faults[""], found.sent, found.seen, found.received,
        found.answered_by_server, found.answered, round(found.seconds),
    )  # fmt: skip
    return "| " + " | ".join(f"{cell:,}" for cell in cells) + " |"


def main() -> None:
    """Run every seed twice: the server alone is killed, and both are."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("pool", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--images", type=int, default=10_000)
    options.add_argument("--batch", type=int, default=50)
    given = options.parse_args()
    given.out.mkdir(parents=True)
    faults = dict.fromkeys(FAULTS, 0)

    def show(seed: int, found: Counted) -> None:
        for fault in FAULTS:
            faults[fault] += found.faults[fault]
        print(row(seed, found), flush=True)

    print("|", " | ".join(COLUMNS), "|\n" + "|---" * len(COLUMNS) + "|", flush=True)
    with nursery(given.out) as processes:
        for client_kills in (0, 5):
            for seed in range(given.seeds):
                folder = given.out / f"{seed}-{client_kills}"
                folder.mkdir()
                found = disturbed(
                    processes, folder.resolve(), given.pool.resolve(), seed=seed, images=given.images,
                    batch=given.batch, rate=RATE, client_kills=client_kills, timeout=3.0, between=(50, 1500),
                )  # fmt: skip
                show(seed, found)
        print("\ntrainings of `ideal`, the first one undisturbed", flush=True)
        students: set[bytes] = set()
        for seed in range(-1, given.seeds):
            folder = given.out / f"training-{seed}"
            folder.mkdir()
            found, student = disturbed_training(
                processes, folder.resolve(), given.pool.resolve(), seed=seed, batch=50, rate=RATE if seed >= 0 else 0,
                kills=4 if seed >= 0 else 0, timeout=3.0, between=(50, 200), settings=SETTINGS,
            )  # fmt: skip
            students.add(student)
            show(seed, found)
    print("\nspoilt requests:", ", ".join(f"{name} {count}" for name, count in faults.items()))
    print("different students:", len(students))


if __name__ == "__main__":
    main()
