"""How well attribution tells spoiled teachers: in runs whose teachers were in part spoiled (`pool.fraction_poisoned`).

Usage: python benchmarks/attribution.py RUN... [--tasks 8] [--episodes 40]

For each run: the mean influence of good and of spoiled teachers, the share of pairs of one of each in which the spoiled
one has the lower influence (1/2 by chance), how many are named as harmful, and how many of these were spoiled.
"""

import argparse
from pathlib import Path

import numpy as np

from ray_dfml.data.pool import Pool
from ray_dfml.doctor import attribution
from ray_dfml.runtime.inputs import read_inputs
from ray_dfml.runtime.rundir import RunFolder


def spoiled(run: Path) -> set[str]:
    """The ids of the teachers of a run whose weights were not those of their pool."""
    inputs = read_inputs(RunFolder.open(run).config())
    pools = {id: inputs.teachers.pool_of(id) for id in inputs.teachers}
    opened = {place: Pool.open(place) for place in set(pools.values())}
    return {id for id, place in pools.items() if not np.array_equal(inputs.teachers[id][1], opened[place].load(id)[0])}


def main() -> None:
    """Print the figures of each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=40)
    given = parser.parse_args()
    for run in given.runs:
        bad = spoiled(run)
        found = attribution.attribute(run, tasks=given.tasks, count=given.episodes, updates=0)
        known = {one.teacher: one.influence.product for one in found.contributions if one.influence}
        good_ones = np.array([value for id, value in known.items() if id not in bad])
        bad_ones = np.array([value for id, value in known.items() if id in bad])
        harmful = set(found.harmful())
        print(f"{run.name}: {len(harmful)} named as harmful, {len(harmful & bad)} of them spoiled")
        for name, values in (("good", good_ones), ("spoiled", bad_ones)):
            if len(values) > 1:
                print(f"  influence of {len(values)} {name}: {values.mean():.4f}, deviation {values.std(ddof=1):.4f}")
        if len(good_ones) and len(bad_ones):
            print(f"  spoiled below good in {100 * (bad_ones[:, None] < good_ones).mean():.0f} % of pairs", flush=True)


if __name__ == "__main__":
    main()
