"""`ray-dfml runs`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ray_dfml.cli import options
from ray_dfml.errors import UsageError
from ray_dfml.plots import number

FORM = "{:<40} {:<14} {:<12} {:>9} {:<13} {:>16}  {}"


@click.command(epilog="\b\nExample:\n  ray-dfml runs runs")
@click.argument("folder", metavar="DIR", type=options.PATH)
@options.as_json
def runs(folder: Path, json_out: bool) -> None:
    """List the runs in DIR and the folders in it, with their states and scores. The latest is last."""
    from ray_dfml.runtime.runs_of import runs_of

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name one that holds run folders")
    rows = runs_of(folder)
    if json_out:
        options.print_json(rows)
        return
    if not rows:
        raise UsageError(f"{folder}: no run in it; `ray-dfml train ... --run-dir {folder / 'first'}` makes one")
    click.echo(FORM.format("run", "method", "state", "round", "test", "accuracy %", "updated"))
    for row in rows:
        rounds = f"{row['round']}/{row['rounds']}" if row["rounds"] else "-"
        test, accuracy = _score(row["score"])
        updated = row["updated"] or "-"
        click.echo(FORM.format(row["run"], row["method"], row["state"], rounds, test, accuracy, updated).rstrip())
        if row["fault"]:
            click.echo(f"  {row['fault']}")


def _score(row: Mapping[str, Any] | None) -> tuple[str, str]:
    """What a score is of, and the score."""
    if row is None:
        return "-", "-"
    test = "top-1" if row.get("shot") is None else f"{row.get('way')}-way {row['shot']}-shot"
    half = number(row.get("ci95"))
    return test, f"{row['mean']:.2f}" + ("" if half is None else f" ± {half:.2f}")
