"""The rows of a sweep as runs of their own, one after another and without Ray, for a machine that has other work.

Usage: python -m benchmarks.papers.rows SWEEP.yaml OUT [--pool POOL ...] [--seeds 0,1] [--points 0,2]
       python -m benchmarks.papers.rows SWEEP.yaml OUT [--pool POOL ...] [--seeds 0,1] --table

`ray-dfml tune SWEEP.yaml` runs the same trials. Here all points are tested, not the best alone, and first all on the
first seed. A run that is done stays, and one that was stopped goes on. Without --pool the pools are those of the file,
which may not be a recipe. The table is of the runs that are done: means over seeds with Student's 95 % interval, and
differences to the first row, paired by seed.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ray_dfml.core.scoring import mean_of_seeds
from ray_dfml.errors import UsageError
from ray_dfml.methods import UNTRAINED
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.launch import start_or_continue
from ray_dfml.sweeps import plan, spec
from ray_dfml.sweeps.plan import Trial

Scores = Mapping[str, float]
"""Column, such as `5-shot`, -> accuracy in percent."""


def trials(sweep: spec.Sweep, pools: Sequence[str], seeds: Sequence[int] = ()) -> list[Trial]:
    """The trials of a sweep on its own pools or on others, all points of a seed before the next one.

    Raises UsageError if the sweep would build its pool and no other is named.
    """
    if not pools and isinstance(sweep.pool, spec.PoolRecipe):
        raise UsageError("this sweep has the recipe of a pool; build it with `ray-dfml pool build`, and name --pool")
    if seeds:
        sweep = sweep.model_copy(update={"seeds": tuple(seeds)})
    found = plan.trials(sweep, list(pools) or list(sweep.pool))
    return sorted(found, key=lambda one: (sweep.seeds.index(one.seed), one.number))


def scores(run: Path, method: str) -> Scores:
    """What a run's method has on the test split: of the weights that it selected, by data set and shot."""
    rows = [row for row in json.loads((run / "scores.json").read_text()) if row["method"] == method]
    selection = "val" if any(row["selection"] == "val" for row in rows) else "last"
    rows = [row for row in rows if row["selection"] == selection]
    several = len({row["data"] for row in rows}) > 1
    return {
        (f"{row['data'].partition('@')[0]} " if several else "")
        + ("top-1" if row["shot"] is None else f"{row['shot']}-shot"): row["mean"]
        for row in rows
    }


def is_done(run: Path) -> bool:
    """Whether a run has been tested."""
    return (run / "status.json").exists() and json.loads((run / "status.json").read_text())["state"] == "done"


def cell(values: Sequence[float], first: Sequence[float] = ()) -> str:
    """A mean with its interval and each seed's value, and with `first` the paired difference to it."""
    mean, half = mean_of_seeds(values)
    text = f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f} ({', '.join(f'{v:.1f}' for v in values)})"
    if not first:
        return text
    mean, half = mean_of_seeds([a - b for a, b in zip(values, first, strict=True)])
    return f"{text}, {mean:+.2f}" + ("" if half is None else f" ± {half:.2f}")


def table(found: Sequence[Trial], folder: Path) -> str:
    """Markdown: a line for each point with runs that are done, and one for the untrained networks of the first."""
    done = [one for one in found if is_done(folder / one.name)]
    if not done:
        return "no run is done"
    method = done[0].config.name
    of: dict[int, dict[int, Scores]] = {}
    for one in done:
        of.setdefault(one.number, {})[one.seed] = scores(folder / one.name, method)
    first = of[min(of)]
    columns = list(next(iter(first.values())))
    lines = [f"| row | {' | '.join(columns)} | seeds | minutes |", "|---" * (len(columns) + 3) + "|"]
    for number in sorted(of):
        runs = [one for one in done if one.number == number]
        common = [] if of[number] is first else [seed for seed in of[number] if seed in first]
        cells = []
        for column in columns:
            text = cell([of[number][seed][column] for seed in of[number]])
            if common:
                both = [[rows[seed][column] for seed in common] for rows in (of[number], first)]
                text += cell(*both).removeprefix(cell(both[0]))
            cells.append(text)
        lines.append(
            f"| {plan.label(runs[0].point)} | {' | '.join(cells)} | {', '.join(map(str, of[number]))} "
            f"| {minutes([folder / one.name for one in runs]):.1f} |"
        )
    fresh = [scores(folder / one.name, UNTRAINED) for one in done if one.number == min(of)]
    if all(fresh):
        cells = [cell([row[column] for row in fresh]) for column in columns]
        lines.append(f"| untrained | {' | '.join(cells)} | {', '.join(map(str, first))} | |")
    return "\n".join(lines)


def minutes(runs: Sequence[Path]) -> float:
    """Minutes of a run, test included: the mean."""
    return sum(json.loads((run / "status.json").read_text())["seconds"] for run in runs) / len(runs) / 60


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pool", action="append", default=[])
    parser.add_argument("--seeds", default="")
    parser.add_argument("--points", default="", help="numbers of points, the first is 0")
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then print the table."""
    args = arguments()
    numbers = [[int(word) for word in text.split(",") if word] for text in (args.seeds, args.points)]
    found = trials(spec.read(args.sweep), args.pool, numbers[0])
    args.out.mkdir(parents=True, exist_ok=True)
    for one in found:
        if not args.table and (not numbers[1] or one.number in numbers[1]):
            print(f"{one.name}: {one.label}", flush=True)
            start_or_continue(one.config, args.out / one.name, Machine(backend="local"), quiet=True)
    print(table(found, args.out))


if __name__ == "__main__":
    main()
