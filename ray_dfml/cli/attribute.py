"""`ray-dfml attribute`."""

from pathlib import Path

import click

from ray_dfml.cli import options
from ray_dfml.files import Uri

EPILOG = """\b
Example:
  ray-dfml attribute runs/free --updates 40 --quarantine out.yaml
"""


@click.command(epilog=EPILOG)
@click.argument("run", metavar="RUN", type=options.PLACE)
@click.option("--tasks", type=click.IntRange(min=2), default=8, show_default=True, help="Tasks of each teacher.")
@click.option(
    "--episodes", type=click.IntRange(min=2), default=40, show_default=True, help="Validation episodes of a data set."
)
@click.option(
    "--updates", type=click.IntRange(min=0), default=0, show_default=True,
    help="Also train learners with so many meta-updates, on the whole bank and without each teacher.",
)  # fmt: skip
@click.option(
    "--quarantine", metavar="FILE", type=options.PATH,
    help="Also write the teachers that harm, with the evidence, for --set pool.without=FILE.",
)  # fmt: skip
@options.as_json
def attribute(
    run: Path | Uri, tasks: int, episodes: int, updates: int, quarantine: Path | None, json_out: bool
) -> None:  # fmt: skip
    """Tell which teachers helped or harmed the learner of RUN, by the images in its bank and real validation episodes.

    Nothing is changed and nobody is asked.
    """
    from ray_dfml.data import quarantine as lists
    from ray_dfml.data.weights_file import write_bytes
    from ray_dfml.doctor import attribution

    options.check_out("--quarantine", quarantine)
    found = attribution.attribute(run, tasks=tasks, count=episodes, updates=updates, say=options.say)
    harmful = found.harmful()
    if quarantine is not None:
        write_bytes(quarantine, lists.text(harmful, f"ray-dfml attribute {run}").encode())
        options.say(f"wrote {quarantine}: {len(harmful)} of {len(found.contributions)} teachers")
    if json_out:
        options.print_json([one.tree() | {"harms": one.teacher in harmful} for one in found.contributions])
        return
    for line in found.lines():
        click.echo(line)
