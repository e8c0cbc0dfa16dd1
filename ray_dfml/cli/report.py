"""`ray-dfml report`."""

from pathlib import Path

import click

from ray_dfml.cli import options
from ray_dfml.errors import UsageError
from ray_dfml.files import Uri

EPILOG = """\b
Example:
  ray-dfml report runs/free runs/average runs/ota --out comparison.md
"""


@click.command("report", epilog=EPILOG)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=options.PLACE)
@click.option("--out", metavar="FILE", type=options.PATH, help="Write .md, .csv or .html; replaces FILE.")
@options.as_json
def report_runs(runs: tuple[Path | Uri, ...], out: Path | None, json_out: bool) -> None:
    """Compare runs: accuracy, time, and the paired difference to the best baseline on the same episodes."""
    from ray_dfml.cli import tables
    from ray_dfml.compare import compare
    from ray_dfml.data import weights_file

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
