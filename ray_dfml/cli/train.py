"""`ray-dfml train`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ray_dfml.cli import options
from ray_dfml.config import PROFILES, RunConfig, presets, resolve
from ray_dfml.errors import BudgetReached, NobodyLeft, UsageError
from ray_dfml.files import Uri
from ray_dfml.methods import METHODS

EPILOG = """\b
Example:
  ray-dfml train free --pool pools/omniglot --data omniglot:$RAY_DFML_DATA/omniglot28.parquet --run-dir runs/free
  --workers 2
"""


@click.command(epilog=EPILOG)
@click.argument("method", type=options.Choice(list(METHODS)))
@click.option("--pool", "pools", multiple=True, help="Pool folder, or its URI in an object store; repeatable.")
@click.option(
    "--data", "data", multiple=True, metavar="SPEC", help="Real data for validation and test only; repeatable."
)
@click.option(
    "--run-dir", required=True, type=options.PLACE, help="Run folder, or its URI in an object store; must not exist."
)
@click.option("--profile", type=options.Choice(PROFILES), default="fixed", show_default=True)
@click.option("--preset", type=options.Choice(list(presets())), help="Named settings.")
@options.settings
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Run seed.")
@click.option("--backend", type=options.Choice(["ray", "local"]), default="ray", show_default=True)
@options.workers
@options.gpus_per_worker
@click.option(
    "--gpus-per-learner", type=options.SHARE, default=0.0, show_default=True,
    help="Part of a GPU for the learner's own work, on the node of this command.",
)  # fmt: skip
@click.option(
    "--job-timeout", type=click.IntRange(1, 10**7), metavar="SECONDS", show_default="none",
    help="Restart a shard that works on one job, or one batch on a GPU, for longer; twice, and the job's teacher is "
    "rejected.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue the run in --run-dir from its last checkpoint.")
@click.option("--resume-or-start", is_flag=True, help="Continue the run in --run-dir if there is one, else start it.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and estimates; do nothing.")
@options.quiet
@options.as_json
@click.pass_context
def train(
    ctx: click.Context, method: str, run_dir: Path | Uri, resume: bool, resume_or_start: bool, dry_run: bool,
    quiet: bool, json_out: bool, **given: Any,
) -> None:  # fmt: skip
    """Train METHOD on a pool of teachers. With --data, also validate and test, and score `random` beside it."""
    from ray_dfml.runtime.driver import Machine, read_inputs
    from ray_dfml.runtime.launch import continue_run, left_out, new_run, start_or_continue

    machine = Machine(
        backend=given["backend"], workers=given["workers"], gpus_per_worker=given["gpus_per_worker"],
        gpus_per_learner=given["gpus_per_learner"],
        job_seconds=given["job_timeout"],
    )  # fmt: skip
    if machine.backend == "ray":
        options.need_ray()
    if resume + resume_or_start + dry_run > 1:
        raise UsageError("give one of --resume, --resume-or-start and --dry-run, which estimates a new run")
    if resume:
        if any(ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE for name in _SETTINGS):
            raise UsageError(
                "--resume takes its settings from the run folder; give only METHOD, --run-dir, where to run, and "
                "--set budget.* to change what may be spent"
            )
        rows = _kept(run_dir, json_out, lambda: continue_run(
            run_dir, method, machine, budget=given["settings"], quiet=quiet
        ))  # fmt: skip
    else:
        config = _config(method, given)
        if dry_run:
            from ray_dfml.runtime.estimate import estimate

            inputs = read_inputs(config)
            for line in (*left_out(inputs.rejected, len(inputs.world.cards)), *inputs.notes):
                options.say(line)
            plan = estimate(config, inputs, machine)
            options.print_json(plan) if json_out else click.echo("\n".join(_lines(plan)))
            return
        begin = start_or_continue if resume_or_start else new_run
        rows = _kept(run_dir, json_out, lambda: begin(config, run_dir, machine, quiet=quiet))
    _show(run_dir, rows, json_out)


def _kept(run_dir: Path | Uri, json_out: bool, run: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The scores of a run. What it kept is shown before an error goes on that ended it early."""
    from ray_dfml.published import local
    from ray_dfml.runtime.rundir import RunFolder

    try:
        return run()
    except (BudgetReached, NobodyLeft):
        folder = RunFolder(local(run_dir))
        if folder.read_status().get("round"):
            _show(run_dir, folder.read_scores(), json_out)
        raise


def _show(run_dir: Path | Uri, rows: list[dict[str, Any]], json_out: bool) -> None:
    if json_out:
        options.print_json({"run": str(run_dir), "scores": rows})
    else:
        click.echo(options.table(rows) if rows else "no --data: the last weights are kept, selection: last")
        click.echo(f"run: {run_dir}")


def _lines(plan: dict[str, Any]) -> list[str]:
    """A plan as text; that of the queries has a line for each teacher."""
    lines = []
    for key, value in plan.items():
        if key == "queries":
            rows = [(f"queries to {id}", one) for id, one in value["teachers"].items()] + [("queries in all", value)]
            lines += [f"{name:<28} {one['images']}, cost {one['money']:g}" for name, one in rows]
        else:
            lines.append(f"{key:<28} {value}")
    return lines


_SETTINGS = ("pools", "data", "profile", "preset", "seed")


def _config(method: str, given: dict[str, Any]) -> RunConfig:
    if not given["pools"] and METHODS[method].needs_pool:
        raise UsageError(f"train {method}: name a pool with --pool")
    return resolve(
        method, profile=given["profile"], preset=given["preset"], settings=given["settings"],
        seed=given["seed"], pool=given["pools"], data=given["data"],
    )  # fmt: skip
