"""`ray-dfml tune`."""

from pathlib import Path

import click

from ray_dfml.cli import options

EPILOG = """\b
Example:
  ray-dfml tune tune_configs/free_adaptation-steps.yaml --run-dir sweeps/steps --small
"""


@click.command(epilog=EPILOG)
@click.argument("sweep", type=options.PATH)
@click.option("--run-dir", required=True, type=options.PATH, help="Folder of the sweep, which all nodes can reach.")
@click.option("--small", is_flag=True, help="Run the small form of the sweep, which takes minutes on 2 cores.")
@click.option("--resume", is_flag=True, help="Continue the sweep in --run-dir; its trials go on where they were.")
@click.option(
    "--backend", type=options.Choice(["ray", "local"]), default="ray", show_default=True,
    help="A trial is a learner with shards (ray), or one process (local).",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Shards of each trial.")
@options.gpus_per_worker
@click.option(
    "--concurrent", type=click.IntRange(min=1), show_default="what fits", help="Most trials at a time."
)  # fmt: skip
@click.option(
    "--track", "trackers", type=options.Choice(["mlflow", "wandb"]), multiple=True,
    help="Hand the figures of all trials to MLflow or Weights & Biases too; repeatable.",
)  # fmt: skip
@options.as_json
def tune(
    sweep: Path, run_dir: Path, small: bool, resume: bool, backend: str, workers: int, gpus_per_worker: float,
    concurrent: int | None, trackers: tuple[str, ...], json_out: bool,
) -> None:  # fmt: skip
    """Run the trials of SWEEP on Ray Tune, rank them by validation, and test the winners on all seeds."""
    from ray_dfml.runtime.driver import Machine
    from ray_dfml.sweeps import plan, results, spec
    from ray_dfml.sweeps.sweep import Place, run

    options.need_ray()
    wanted = spec.read(sweep, small=small)
    machine = Machine(backend=backend, workers=workers, gpus_per_worker=gpus_per_worker)
    place = Place(machine=machine, concurrent=concurrent, trackers=trackers)
    rows = run(wanted, run_dir, place, resume=resume, say=options.say)
    if json_out:
        keys = list(dict.fromkeys(key for row in rows for key in row.point))
        table = results.columns(rows, keys)
        options.print_json({
            "sweep": str(run_dir),
            "points": [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)],
        })  # fmt: skip
        return
    for rank, row in enumerate(rows, 1):
        tests = "".join(f"   test {kind} {_shown(value)}" for kind, value in row.tests.items())
        validation = "none" if row.validation is None else _shown(row.validation)
        click.echo(f"{rank:>3}  {plan.label(row.point):<50} validation {validation}{tests}")
    click.echo(f"sweep: {run_dir}")


def _shown(value: tuple[float, float | None]) -> str:
    mean, half = value
    return f"{mean:.2f} %" if half is None else f"{mean:.2f} ± {half:.2f} %"
