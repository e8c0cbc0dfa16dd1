"""`ray-dfml quickstart`: from teachers to a tested learner on embedded data, in minutes and without network."""

import time
from pathlib import Path
from typing import Any

import click

from ray_dfml.cli import options
from ray_dfml.errors import UsageError
from ray_dfml.runtime import host

POOL = {"models": 12, "way": 5, "seed": 0}


@click.command(epilog="\b\nExample:\n  ray-dfml quickstart --run-dir runs/first")
@click.option("--run-dir", type=options.PATH, help="Run folder; default: runs/quickstart-TIME.")
@click.option("--backend", type=options.Choice(["ray", "local"]), default="ray", show_default=True)
@click.option(
    "--workers", type=click.IntRange(min=1), default=lambda: min(2, host.processors()), show_default="up to 2"
)
@options.settings
@options.as_json
def quickstart(run_dir: Path | None, backend: str, workers: int, settings: tuple[str, ...], json_out: bool) -> None:
    """Train teachers on rendered characters, run FREE without their images, and test on unseen characters."""
    from ray_dfml.config import pretrain_config, resolve
    from ray_dfml.data.pool import Pool
    from ray_dfml.files import resolved
    from ray_dfml.runtime import build_pool, cost_lines
    from ray_dfml.runtime.driver import Machine
    from ray_dfml.runtime.launch import new_run
    from ray_dfml.runtime.place import opened

    if backend == "ray":
        options.need_ray()
    run_dir = run_dir or resolved("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")
    if run_dir.exists():
        raise UsageError(f"{run_dir}: exists already; choose another --run-dir")
    own = [text for text in settings if text.startswith("pretrain.")]
    began = time.monotonic()
    options.say("[1/4] pool: teachers on rendered characters; the images are not used again until the test")
    pool = Pool.create(run_dir.with_name(run_dir.name + "-pool"))
    cfg = pretrain_config(["pretrain.epochs=20", *own])
    machine = Machine(backend=backend, workers=workers)
    with opened(machine) as place:
        image, planned = build_pool.plan("glyphs", archs=["conv4"], note=options.say, **POOL)
        options.say(f"      {cost_lines.of_pool('glyphs', planned, cfg, workers if backend == 'ray' else 1)}")
        accuracies = build_pool.build(
            pool, "glyphs", image, planned, cfg, backend=place.backend(), at_once=len(planned), seed=0,
            on_teacher=_silent,
        )  # fmt: skip
        mean = sum(accuracies) / len(accuracies)
        options.say(f"      {len(accuracies)} teachers, mean held-out accuracy {mean:.1f} %")
        refused = [row for row in pool.check() if not row["ok"]]
        options.say(f"[2/4] check: {len(accuracies) - len(refused)} ok, {len(refused)} rejected")
        config = resolve(
            "free", preset="quickstart", settings=[text for text in settings if text not in own],
            pool=(str(pool.path),), data=("glyphs",),
        )  # fmt: skip
        options.say(f"[3/4] train: FREE, {config.total_rounds} rounds, backend {backend}; [4/4] test follows")
        rows = new_run(config, run_dir, machine, cluster=place.cluster())
    seconds = time.monotonic() - began
    _report(rows, run_dir, seconds, json_out)


def _silent(id: str, accuracy: float) -> None:
    """Quickstart prints one line for the whole pool."""


def _report(rows: list[dict[str, Any]], run_dir: Path, seconds: float, json_out: bool) -> None:
    if json_out:
        options.print_json({"run": str(run_dir), "seconds": round(seconds, 1), "scores": rows})
        return
    click.echo(options.table(rows))
    click.echo(f"{seconds:.0f} s   run: {run_dir}   open {run_dir / 'report.html'}")
    click.echo(f"next: ray-dfml adapt {run_dir} --support my_classes/ --query my_images/")
