"""`ray-dfml reproduce`."""

from pathlib import Path
from typing import Any

import click

from ray_dfml.cli import options
from ray_dfml.errors import NotReproduced, UsageError
from ray_dfml.files import resolved

EPILOG = """\b
Example:
  ray-dfml reproduce glyphs-no-pool-5shot
  ray-dfml reproduce --list
"""


@click.command(epilog=EPILOG)
@click.argument("id", required=False)
@click.option(
    "--out", type=options.PATH, show_default="runs/reproduce",
    help="Folder of pools and runs, which the numbers of a table share.",
)  # fmt: skip
@click.option("--list", "listed", is_flag=True, help="Show all numbers, with the minutes that they took.")
@click.option("--dry-run", is_flag=True, help="Print the cost and the commands; run nothing.")
@options.as_json
def reproduce(id: str | None, out: Path | None, listed: bool, dry_run: bool, json_out: bool) -> None:
    """Make the number ID of the README or of docs/results.md again, and say whether it is what was recorded.

    An interrupted one goes on in the same --out, and what is done there is not done again: after a change of the code
    take a new --out. The exit code is 0 if the new value and the recorded one differ by no
    more than sqrt(a^2 + b^2), where a and b are the half-widths of their 95 % intervals, and 1 if they differ by more.
    """
    if listed == (id is not None):
        raise UsageError("name the id of a number, or give --list")
    if id is None:
        _list(json_out)
        return
    from ray_dfml.reproduce import registry

    table, number = registry.find(id)

    from ray_dfml.reproduce import remake
    from ray_dfml.reproduce.measure import agree, measure

    folder = (out or resolved("runs") / "reproduce") / table.name
    plan = remake.commands(table, number, folder)
    minutes = table.minutes(number)
    options.say(f"{number.what}")
    cost = f"about {minutes:.0f} minutes" if minutes >= 1 else "less than a minute"
    options.say(f"cost: {cost} without the tests, {len(plan)} command(s), on {table.hardware}")
    if dry_run:
        shown = {"id": id, "minutes": round(minutes, 2), "commands": [command.shown for command in plan]}
        options.print_json(shown) if json_out else click.echo("\n".join(command.shown for command in plan))
        return
    remake.run(table, number, folder, options.say)
    new = measure(table, number, folder)
    holds = agree(new.value, new.half, number.value, number.half)
    found = {
        "id": id, "expected": number.value, "half": number.half, "covers": number.covers, "unit": number.unit,
        "got": new.value, "got_half": new.half, "each": list(new.each), "inside": holds,
        "commit": table.commit_of(number), "out": str(folder),
    }  # fmt: skip
    options.print_json(found) if json_out else click.echo(_shown(found))
    if not holds:
        note = f" ({number.note})" if number.note else ""
        raise NotReproduced(
            f"{id}: {new.value:.2f} is outside the interval of {number.value:.2f}, recorded at commit "
            f"{found['commit']}{note}"
        )


def _shown(found: dict[str, Any]) -> str:
    """What was expected, what was got, and whether it is inside."""
    unit, each = found["unit"], ", ".join(f"{value:.2f}" for value in found["each"])
    return "\n".join([
        f"expected  {_value(found['expected'], found['half'], unit)}, over {found['covers']}, commit {found['commit']}",
        f"got       {_value(found['got'], found['got_half'], unit)}, each seed: {each}",
        f"inside    {'yes' if found['inside'] else 'no'}",
    ])  # fmt: skip


def _value(value: float, half: float, unit: str) -> str:
    """A number with its interval; a difference has a sign."""
    return f"{value:{'+' if unit == 'points' else ''}.2f} ± {half:.2f} {unit}"


def _list(json_out: bool) -> None:
    """One line for each number."""
    from ray_dfml.reproduce import registry

    rows = [
        {
            "id": one.id, "value": one.value, "half": one.half, "unit": one.unit, "seeds": list(one.seeds),
            "minutes": round(table.minutes(one), 2), "data": list(table.data), "what": one.what,
        }
        for table, one in registry.numbers()
    ]  # fmt: skip
    if json_out:
        options.print_json(rows)
        return
    width = max(len(row["id"]) for row in rows)
    for row in rows:
        value = _value(row["value"], row["half"], row["unit"])
        click.echo(f"{row['id']:<{width}}  {value:<22} {row['minutes']:>6.3g} min  {row['what']}")
