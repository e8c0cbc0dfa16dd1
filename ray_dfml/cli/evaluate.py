"""`ray-dfml evaluate`."""

from pathlib import Path

import click

from ray_dfml.cli import options
from ray_dfml.files import Uri

EPILOG = """\b
Example:
  ray-dfml evaluate runs/free --data omniglot:$RAY_DFML_DATA/omniglot28.parquet --shot 1 --shot 5
"""


@click.command(epilog=EPILOG)
@click.argument("weights", metavar="RUN|WEIGHTS", type=options.PLACE)
@click.option("--data", "spec", required=True, metavar="SPEC", help="Real data.")
@click.option("--split", type=options.Choice(["train", "val", "test"]), default="test", show_default=True)
@click.option("--way", type=click.IntRange(min=2), help="Classes of an episode; default: the learner's.")
@click.option("--shot", "shots", type=click.IntRange(min=1), multiple=True, default=(1, 5), show_default=True)
@click.option("--episodes", type=click.IntRange(min=1), default=600, show_default=True)
@click.option(
    "--bn", type=options.Choice(["transductive", "support", "running"]), help="Batch norm at test; default: the run's."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the episodes.")
@options.workers
@click.option("--backend", type=options.Choice(["ray", "local"]), default="local", show_default=True)
@options.quiet
@options.as_json
def evaluate(weights: Path | Uri, json_out: bool, **given: object) -> None:
    """Test a learner on real episodes, or students on all images of a split, and `random` beside them.

    Students are not adapted, so they take none of --way, --shot, --episodes, --bn and --seed.
    """
    from ray_dfml.runtime.meta_test import meta_test

    if given["backend"] == "ray":
        options.need_ray()
    rows = meta_test(weights, **given)  # pyright: ignore[reportArgumentType]
    options.print_json(rows) if json_out else click.echo(options.table(rows))
