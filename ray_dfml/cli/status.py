"""`ray-dfml status`."""

from pathlib import Path

import click

from ray_dfml.cli import options
from ray_dfml.files import Uri

EPILOG = """\b
Example:
  ray-dfml status /shared/runs/free-1 --follow
"""


@click.command(epilog=EPILOG)
@click.argument("run", type=options.PLACE)
@click.option("--follow", is_flag=True, help="Show rounds as they end, then the scores; ends with the run's exit code.")
@options.as_json
def status(run: Path | Uri, follow: bool, json_out: bool) -> int:
    """Say how RUN stands, from its folder alone. The run may be at work anywhere."""
    from ray_dfml import published
    from ray_dfml.runtime import watch
    from ray_dfml.runtime.rundir import RunFolder

    folder = RunFolder.open(published.local(run))

    def refresh() -> None:
        if isinstance(run, Uri):
            published.fetch(run, folder.path, wanted=("status.json", "metrics.jsonl", "scores.json").__contains__)

    code = watch.follow(folder, refresh) if follow else 0
    scores = folder.read_scores()
    if json_out:
        options.print_json({"run": str(run), "status": folder.read_status(), "scores": scores})
        return code
    if not follow:
        click.echo("\n".join(watch.summary(folder)))
    if scores:
        click.echo(options.table(scores))
    click.echo(f"run: {run}")
    return code
