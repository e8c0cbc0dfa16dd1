"""Students of one teacher that names a class: top-1 accuracy against true queries, for IDEAL's profiles and the others.

Usage: python benchmarks/ideal.py POOL SPEC OUT [--budgets 1000,2500,...] [--methods fixed,paper,...] [--seeds 0,1,2]
       python benchmarks/ideal.py POOL SPEC OUT --sweep             lambda and E_G of the generator, at the first budget
       python benchmarks/ideal.py POOL SPEC OUT --table             the table of what is there; nothing is run
A pool has one teacher, which may be behind HTTP. A cell is `ray-dfml train`, from its own seed to its own budget; its
run folder is OUT/runs/CELL and its row OUT/CELL.json. Rows that exist are kept, and a run that was stopped is resumed,
so that a stopped table goes on, and two processes may share the seeds. `sent` is what the ledger counted.

`fixed`, `paper` and `code` are IDEAL's profiles; with `code` the budget is what is sent, as everywhere. Other names are
methods, in their profile `fixed` unless one is named, as in `dfme,paper`. A word with `=` is a setting, of IDEAL where
no method is named. The sweep is of IDEAL's generator in the loop of `fixed`: all images are the generator's, a round
asks about 250, and the student trains on all answers so far. In the loop of `paper` each of its cells names one class.
Scores are top-1 on the test split, the last weights, mean over seeds with the sample standard deviation in brackets.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ray_dfml.config import PROFILES

BUDGETS = (1000, 2500, 5000, 10_000, 25_000)
METHODS = (*PROFILES, "dfme", "dafl", "zskt", "deepinversion", "cmi", "dast", "zsdb3")
LOOP = "method.images=generator,method.candidates=1,method.first=250,method.growth=0"
SWEEP = tuple(
    f"{LOOP},method.generator_steps={steps},method.lam={lam}" for steps in (3, 5, 10, 30) for lam in (0, 1, 5)
)


def words(method: str, budget: int) -> list[str]:
    """The arguments of `train` that a column stands for."""
    settings = [part for part in method.split(",") if "=" in part]
    names = [part for part in method.split(",") if "=" not in part] or ["fixed"]
    head = [*([] if names[0] not in PROFILES else ["ideal"]), *names]
    head = [*head[:1], *(word for name in head[1:] for word in ("--profile", name))]
    return head + [word for text in (f"method.budget={budget}", *settings) for word in ("--set", text)]


def measure(args: argparse.Namespace, method: str, budget: int, seed: int) -> dict[str, object]:
    """Train, and read what the run folder says."""
    name = f"{method}-{budget}-{seed}".replace(",", "_").replace("=", "_")
    row, run = args.out / f"{name}.json", args.out / "runs" / name
    if row.exists():
        return json.loads(row.read_text())
    train = [sys.executable, "-m", "ray_dfml", "train"]
    if run.exists():
        command = [*train, words(method, budget)[0], "--run-dir", str(run), "--backend", "local", "--resume"]
    else:
        command = [*train, *words(method, budget), "--run-dir", str(run), "--seed", str(seed), "--backend", "local"]
        command += ["--pool", str(args.pool), "--data", args.spec, "--set", "eval.every=1000000"]
    began = time.monotonic()
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}")
    scores = json.loads((run / "scores.json").read_text())
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    found = {
        "method": method, "budget": budget, "seed": seed, "accuracy": scores[0]["mean"], "ci95": scores[0]["ci95"],
        "random": scores[1]["mean"], "sent": sum(line["sent"] for line in ledger),
        "answered": sum(line["answered"] for line in ledger), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    row.write_text(json.dumps(found) + "\n")
    return found


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: a line per method, a column per budget; mean over seeds, and what was sent where it is less."""
    budgets = sorted({int(str(row["budget"])) for row in rows})
    lines = [f"| method | {' | '.join(f'{budget:,}' for budget in budgets)} |", "|---" * (len(budgets) + 1) + "|"]
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        cells = []
        for budget in budgets:
            mine = [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
            found = [float(str(row["accuracy"])) for row in mine]
            spread = f" ({statistics.stdev(found):.2f})" if len(found) > 1 else ""
            sent = max((int(str(row["sent"])) for row in mine), default=0)
            less = f", sent {sent:,}" if mine and sent != budget else ""
            cells.append(f"{statistics.mean(found):.2f}{spread}{less}" if found else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("spec")
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--methods", default=";".join(METHODS), help="names, or settings, with ; between them")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    budgets = [int(text) for text in args.budgets.split(",")]
    methods = SWEEP if args.sweep else args.methods.split(";")
    cells = [
        (m, b, int(s)) for s in args.seeds.split(",") for b in budgets[: 1 if args.sweep else None] for m in methods
    ]
    if not args.table:
        for cell in cells:
            print(measure(args, *cell), flush=True)
    print(table([json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]))


if __name__ == "__main__":
    main()
