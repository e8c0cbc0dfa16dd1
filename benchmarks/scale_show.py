"""The tables and the picture of `scale.py`: memory, rounds, start-up and Ray's overhead by the number of teachers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MEMORY = {"driver": "driver MB", "learner": "learner MB", "shard": "shard MB"}
BYTES = {"sent": "driver sent MB", "received": "driver received MB", "bytes read, inputs": "driver read of files MB"}
START = {
    "seconds, inputs": "inputs read s", "seconds, first round": "first round done s",
    "cpu, inputs": "driver's CPU s: inputs read", "cpu, first round": "first round done",
}  # fmt: skip
CPU = {"cpu a round, learner": "learner's CPU s", "cpu a round, driver": "driver's CPU s"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def tables(results: dict[str, Any]) -> str:
    """What was measured, as tables."""
    runs = {f"{int(n):,}": one for n, one in results["runs"].items()}
    in_turn = {f"{int(n):,}": one for n, one in results["in turn"].items()}
    parts = list(next(iter(in_turn.values())))
    memory = [
        [n, *(f"{one['memory'][key] / 1e6:.1f}" for key in MEMORY), *(f"{one[key] / 1e6:.1f}" for key in BYTES)]
        for n, one in runs.items()
    ]
    alone = [
        [n, *(f"{one['round'][part]:.3f}" for part in parts), *(f"{one[key]:.3f}" for key in ("driver share", *CPU))]
        for n, one in runs.items()
    ]
    rounds = [[n, *(f"{one[part]:.3f}" for part in parts)] for n, one in in_turn.items()]
    start = [[n, *(f"{one[key]:.1f}" for key in START)] for n, one in runs.items()]
    overhead = [
        [
            f"{int(n):,}", f"{1000 * statistics.median(times):.1f}",
            f"{1000 * min(times):.1f} to {1000 * max(times):.1f}", f"{1000 * statistics.median(times) / int(n):.2f}",
        ]
        for n, times in results["overhead"].items()
    ]  # fmt: skip
    turns = [
        [f"{int(n):,}", f"{statistics.median(times):.3f}", f"{min(times):.3f} to {max(times):.3f}"]
        for n, times in results["processor"].items()
    ]
    return "\n\n".join(
        [
            table(["teachers", *MEMORY.values(), *BYTES.values()], memory),
            table(["teachers, in turn", *(f"{part} s" for part in parts)], rounds),
            table(["teachers, alone", *(f"{part} s" for part in parts), "driver's share", *CPU.values()], alone),
            table(["teachers", *START.values()], start),
            table(["teachers", "round in one process, CPU s", "least to most s"], turns),
            table(["jobs in a round", "overhead ms", "least to most ms", "of a job ms"], overhead),
        ]
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Write four panels as a PNG."""
    runs = {int(n): one for n, one in results["runs"].items()}
    counts = list(runs)
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    memory, rounds, start, overhead = figure.subplots(2, 2).flat
    for who in MEMORY:
        memory.plot(counts, [one["memory"][who] / 1e6 for one in runs.values()], marker="o", label=who)
    memory.set(title="private memory in rounds", ylabel="MB")
    for part in next(iter(results["in turn"].values())):
        rounds.plot(counts, [one[part] for one in results["in turn"].values()], marker="o", label=part)
    middle = [statistics.median(times) for times in results["processor"].values()]
    rounds.plot(counts, middle, marker="s", color="black", label="one process, processor time")
    rounds.set(title="median time of a round of eight teachers, pools in turn", ylabel="s")
    for key, label in (("cpu, inputs", "pool and data read"), ("cpu, first round", "first round done")):
        start.plot(counts, [one[key] for one in runs.values()], marker="o", label=label)
    start.set(title="start-up: the driver's processor time", ylabel="s")
    times = [[1000 * one for one in seconds] for seconds in results["overhead"].values()]
    middle = [statistics.median(one) for one in times]
    below = [m - min(one) for m, one in zip(middle, times, strict=True)]
    above = [max(one) - m for m, one in zip(middle, times, strict=True)]
    jobs = [int(n) for n in results["overhead"]]
    overhead.errorbar(jobs, middle, yerr=[below, above], marker="o", capsize=3, label="median, least and most")
    overhead.set(title="Ray's overhead of a round", ylabel="ms", yscale="log")
    for axis in (memory, rounds, start, overhead):
        axis.set(xscale="log", xlabel="jobs in a round" if axis is overhead else "teachers in the pool")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        if axis is not overhead:
            axis.set_ylim(bottom=0)
    figure.suptitle(f"{results['nodes']} simulated nodes on one machine")
    figure.savefig(path, dpi=110)
