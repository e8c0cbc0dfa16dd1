"""All methods on Omniglot with equal time: a pool of 20 Conv4-32 teachers per seed, 5-way, 1- and 5-shot.

Usage: python benchmarks/methods.py SPEC OUT [--seconds 180] [--seeds 3,4,5] [--methods free,purer,...]
       python benchmarks/methods.py SPEC OUT --rounds free=15,purer=27 [--seeds 3] [--against OUT2]
Rows are files OUT/METHOD-SEED.json; those that exist are kept, so that a stopped run goes on, and two processes may
share the seeds. `--table` prints the table of what is there and measures nothing.

The presets were found on a pool of seed 0, scored on validation episodes and, for an earlier table, on test episodes of
`eval.seed` 0. Hence other pools and other episodes (`eval.seed` 1) here.

`no-pool` has no teacher, and `maml-oracle` real images instead: neither needs a pool, so a seed of these alone builds
none.

A method trains until its process has used `--seconds` of processor time (one thread), whatever else the machine does;
validation and test are not counted. A method that `--rounds` names trains for so many rounds instead: equal work, to
compare two commits. `--against` prints the paired differences to the rows in another folder. The
step size at test is chosen per method on validation episodes, as `train` does.
"""

import argparse
import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml.config import resolve
from ray_dfml.core.scoring import mean_ci95
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.data.pretrain import PretrainConfig
from ray_dfml.methods.base import World
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime import build_pool
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.scorer import Entry, Scorer
from ray_dfml.types import Labelled

INVERSION = {"free": "characters", "purer": "characters-purer", "bidf-mkd": "characters-bidf"}
ALONE = {"no-pool": "no-pool-characters", "maml-oracle": None}
"""The methods without teachers that train, and their presets."""
BASELINES = ("random", "best-model", "average", "ota", "dro")
ORACLE = (
    "method.rounds=100000", "method.updates_per_round=5", "method.replay.shot=1", "method.replay.tasks=4",
    "method.replay.inner_lr=0.1", "method.replay.lr=0.003",
)  # fmt: skip
"""The replay of the presets, on real images."""

TEST = ("eval.seed=1", "eval.val_episodes=30", "eval.episodes=600")
CHECKPOINTS = 4
"""Validations of a training run, spread over its time."""


def pool_of(spec: str, folder: Path, seed: int) -> Pool:
    """The seed's pool, built if it is not there."""
    if folder.exists():
        return Pool.open(folder)
    image, planned = build_pool.plan(spec, models=20, archs=["conv4"], way=5, seed=seed)
    pool = Pool.create(folder)
    build_pool.build(
        pool, spec, image, planned, PretrainConfig(), backend=LocalBackend(no_teachers), seed=seed,
        on_teacher=lambda id, accuracy: None,
    )  # fmt: skip
    return pool


def run(method: str, seed: int, spec: str, out: Path, seconds: float, rounds: int | None) -> dict[str, Any]:
    """One row: scores per episode, and what was met on the way. `rounds` goes before `seconds` where it is given."""
    commit, data = _commit(), datasets.load(spec)
    alone = method in ALONE
    parts = {split: data.subset(split) for split in ("train", "val", "test")}
    sets = [Labelled("omniglot", s, np.ascontiguousarray(parts[s].images), parts[s].labels) for s in ("val", "test")]
    oracle = method == "maml-oracle"
    endless = ("method.rounds=100000",) if method == "no-pool" else ()
    config = resolve(
        method, preset=(INVERSION | ALONE).get(method), settings=(*(ORACLE if oracle else endless), *TEST), seed=seed
    )
    train = parts["train"]
    real = {f"omniglot/{c}": train.images[train.labels == i] for i, c in enumerate(train.class_names)}
    pool = None if alone else pool_of(spec, out / f"pool-{seed}", seed)
    cards = pool.cards if pool else ()
    image = cards[0].image if cards else build_pool.plan(spec, models=0, archs=["conv4"], way=5, seed=seed)[0]
    world = World(cards=cards, arch="conv4", image=image, way=5, seed=seed, real=real if oracle else {})
    teachers = {card.id: (card, *pool.load(card.id)) for card in cards} if pool else {}
    trainer = Trainer(config.model_dump(mode="json"), world, sets, LocalBackend(teachers.__getitem__), None)
    scorer = Scorer(
        config.eval, way=5, head="maml", val=[("omniglot", "val")], test=[("omniglot", "test")], ask=trainer.score
    )  # fmt: skip
    spent, began, rows, r = 0.0, time.perf_counter(), [], 0
    seconds = math.inf if rounds else seconds
    while r < (rounds or config.method.rounds) and spent < seconds:
        used = time.process_time()
        metrics = trainer.round(r)
        spent += time.process_time() - used
        row = {"seconds": round(spent, 2)} | {k: v for k, v in metrics.items() if not k.startswith("seconds/")}
        row["recovery_share"] = metrics.get(f"seconds/{method}.recover", 0.0) / metrics["seconds/round"]
        if method in (*INVERSION, *ALONE) and spent > seconds * (len(_validated(rows)) + 1) / CHECKPOINTS:
            row["validation"] = scorer.validate(trainer.candidates()["last"], trainer.method.readings[-1])
        rows.append(row)
        r += 1
    last = trainer.candidates()["last"]
    entries = [Entry(method=method, selection="last", weights=last, readings=trainer.method.readings)]
    scores = {f"{s.method} {s.shot}": s.accuracies.tolist() for s in scorer.test(entries)}
    return {
        "commit": commit,
        "config": config.model_dump(mode="json"),
        "method": method, "seed": seed, "preset": config.preset, "rounds": r, "train_seconds": round(spent, 1),
        "wall_seconds": round(time.perf_counter() - began, 1), "test_step": [s.lr for s in scorer.steps(entries)],
        "scores": scores, "log": rows,
    }  # fmt: skip


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _validated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "validation" in row]


def table(out: Path) -> None:
    """Print the table of all rows, with paired differences to the best baseline in the space of parameters."""
    rows = [json.loads(path.read_text()) for path in sorted(out.glob("*-[0-9]*.json"))]
    names = sorted({key.rsplit(" ", 1)[0] for row in rows for key in row["scores"]})
    least = min(len(accuracies) for row in rows for accuracies in row["scores"].values())
    print(f"{least} episodes per seed; commits {', '.join(sorted({row.get('commit', 'unknown') for row in rows}))}")
    for shot in (1, 5):
        found: dict[str, dict[int, np.ndarray]] = {name: {} for name in names}
        for row in rows:
            for name in names:
                if f"{name} {shot}" in row["scores"]:
                    found[name][row["seed"]] = np.array(row["scores"][f"{name} {shot}"][:least])
        base = {n: s for n, s in found.items() if s and n.startswith(BASELINES)}
        best = max(base, key=lambda n: np.mean([a.mean() for a in base[n].values()])) if base else None
        print(f"\n{shot}-shot; best baseline: {best}\n")
        print("| method | seeds | accuracy | per seed | std over seeds | paired difference to the best baseline |")
        print("|---|---|---|---|---|---|")
        for name in sorted(names, key=lambda n: -np.mean([a.mean() for a in found[n].values()])):
            seeds = found[name]
            mean, ci = mean_ci95(np.mean(list(seeds.values()), axis=0))
            each = [float(a.mean()) for a in seeds.values()]
            gap = "-"
            if best and name != best:
                gaps = [a - base[best][s] for s, a in seeds.items() if s in base[best]]
                gap = "{:+.2f} ± {:.2f}".format(*mean_ci95(np.mean(gaps, axis=0))) if gaps else "-"
            spread = f"{np.std(each, ddof=1):.2f}" if len(each) > 1 else "-"
            shown = ", ".join(f"{a:.1f}" for a in each)
            print(f"| {name} | {len(each)} | {mean:.2f} ± {ci:.2f} | {shown} | {spread} | {gap} |")
    print(
        "\n| run | rounds | training s | recovery s | meta-updates | teacher's accuracy | validation at | test step |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        log = row["log"]
        took = np.diff([0.0] + [line["seconds"] for line in log])
        recovery = sum(t * line["recovery_share"] for t, line in zip(took, log, strict=True))
        updates = sum(line.get("replay/updates") or 0 for line in log)
        seen = [line["recover/accuracy"] for line in log if line.get("recover/accuracy") is not None]
        curve = ", ".join(f"{line['seconds']:.0f} s: {line['validation']:.1f}" for line in log if "validation" in line)
        print(
            f"| {row['method']} {row['seed']} | {row['rounds']} | {row['train_seconds']:.0f} | {recovery:.0f} | "
            f"{updates or '-'} | {f'{np.mean(seen[-5:]):.1f}' if seen else '-'} | {curve or '-'} | "
            f"{', '.join(f'{v:g}' for v in row['test_step']) or '-'} |"
        )


def differences(out: Path, other: Path) -> None:
    """Print, for each row that both folders have, the mean of both and the paired difference over the episodes."""
    print("\n| row | commit there | there | here | here - there |")
    print("|---|---|---|---|---|")
    for path in sorted(out.glob("*-[0-9]*.json")):
        if not (other / path.name).exists():
            continue
        here, there = (json.loads((folder / path.name).read_text()) for folder in (out, other))
        for name, accuracies in here["scores"].items():
            now, then = np.array(accuracies), np.array(there["scores"][name])
            gap = "{:+.2f} ± {:.2f}".format(*mean_ci95(now - then))
            print(
                f"| {name}-shot, seed {here['seed']} | {there['commit']} | {then.mean():.2f} | "
                f"{now.mean():.2f} | {gap} |"
            )


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--seeds", default="3,4,5")
    parser.add_argument("--methods", default=",".join((*INVERSION, *BASELINES, *ALONE)))
    parser.add_argument("--rounds", default="", help="METHOD=N,...")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rounds = {name: int(count) for name, _, count in (one.partition("=") for one in given.rounds.split(",") if one)}
    for seed in [] if given.table else [int(s) for s in given.seeds.split(",")]:
        for method in given.methods.split(","):
            target = given.out / f"{method}-{seed}.json"
            if not target.exists():
                row = run(method, seed, given.spec, given.out, given.seconds, rounds.get(method))
                target.with_suffix(".part").write_text(json.dumps(row))
                target.with_suffix(".part").rename(target)
                print(method, seed, row["train_seconds"], flush=True)
    table(given.out)
    if given.against:
        differences(given.out, given.against)


if __name__ == "__main__":
    main()
