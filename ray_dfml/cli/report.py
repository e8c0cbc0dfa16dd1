"""`ray-dfml report`."""

from pathlib import Path

import click

from ray_dfml.cli import options
from ray_dfml.errors import UsageError
from ray_dfml.files import Uri

EPILOG = """\b
Example:
  ray-dfml report runs/free runs/average runs/ota --out comparison.md
  ray-dfml report runs/free --html
"""


@click.command("report", epilog=EPILOG)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=options.PLACE)
@click.option("--out", metavar="FILE", type=options.PATH, help="Write .md, .csv or .html; replaces FILE.")
@click.option("--html", is_flag=True, help="Make the page and the model card of each run again instead.")
@options.as_json
def report_runs(runs: tuple[Path | Uri, ...], out: Path | None, html: bool, json_out: bool) -> None:
    """Compare runs: accuracy, time, and the paired difference to the best baseline on the same episodes.

    With --html nothing is compared: report.html and MODEL_CARD.md of each run are made again from its folder.
    """
    from ray_dfml.cli import tables
    from ray_dfml.compare import compare
    from ray_dfml.data import weights_file

    if html:
        _remake(runs, out, json_out)
        return
    form = tables.as_text
    if out is not None:
        if out.suffix.lower() not in tables.FORMATS:
            raise UsageError(f"--out {out}: name a file that ends in {', '.join(tables.FORMATS)}")
        options.check_out("--out", out)
        form = tables.FORMATS[out.suffix.lower()]
    found = compare(runs)
    if out is not None:
        weights_file.write_bytes(out, form(found).encode())
        options.say(f"wrote {out}")
    if json_out:
        options.print_json(found.tree())
    elif out is None:
        click.echo(form(found), nl=False)


def _remake(runs: tuple[Path | Uri, ...], out: Path | None, json_out: bool) -> None:
    from ray_dfml import report

    if out is not None:
        raise UsageError("--html writes into the folder of each run; do not give --out with it")
    for run in runs:
        if isinstance(run, Uri):
            raise UsageError(f"{run}: --html needs a run folder on a disk; copy the run, or compare it with --out")
    for run in runs:
        report.write(Path(run))
        options.say(f"wrote {run / 'report.html'} and MODEL_CARD.md")
    if json_out:
        options.print_json([str(run / "report.html") for run in runs])
