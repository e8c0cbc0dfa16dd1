"""`ray-dfml check`."""

import os
from dataclasses import asdict
from pathlib import Path

import click

from ray_dfml.cli import options
from ray_dfml.errors import ResourceError
from ray_dfml.files import Uri

EPILOG = """\b
Example:
  ray-dfml check --address 10.0.0.1:6379 --workers 16 --storage /shared
"""


@click.command(epilog=EPILOG)
@click.option("--address", metavar="HOST:PORT", help="Head of the cluster, or auto; by default RAY_ADDRESS.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Shards there must be room for."
)
@options.gpus_per_worker
@click.option("--storage", type=options.PLACE, metavar="PATH|URI", help="A folder that every node should see.")
@click.option(
    "--wait", type=click.IntRange(min=0), default=0, show_default=True, metavar="SECONDS", help="Wait so long for room."
)
@options.as_json
def check(
    address: str | None, workers: int, gpus_per_worker: float, storage: Path | Uri | None, wait: int, json_out: bool
) -> None:
    """Look whether a cluster is fit for runs: room, versions on every node, clocks, transfers, storage, token."""
    if address:
        os.environ["RAY_ADDRESS"] = address  # before Ray is imported, which reads it
    options.need_ray()
    from ray_dfml.runtime.cluster import examine

    found = examine(workers=workers, gpus_per_worker=gpus_per_worker, storage=storage, seconds=wait)
    if json_out:
        options.print_json([asdict(one) for one in found])
    else:
        for one in found:
            click.echo(f"{'ok' if one.ok else 'FAIL' if one.fatal else 'warn':<5}{one.check:<10} {one.text}")
    bad = [one.check for one in found if not one.ok and one.fatal]
    if bad:
        raise ResourceError(f"check: {', '.join(bad)}: not fit for a run")
