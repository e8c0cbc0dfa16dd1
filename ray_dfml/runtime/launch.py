"""From a configuration, or an existing run folder, to a finished run: what the command line and `ray_dfml.train` call."""

from pathlib import Path
from typing import Any

from ray_dfml import report
from ray_dfml.config import RunConfig
from ray_dfml.errors import UsageError
from ray_dfml.runtime import driver, rundir
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.rundir import RunFolder


def new_run(config: RunConfig, path: Path, machine: Machine, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Make the run folder, train, test, report. Returns the rows of `scores.json`. Raises UsageError if `path` exists."""
    if path.exists():
        raise UsageError(f"{path}: exists already; add --resume to continue that run, or choose another --run-dir")
    inputs = driver.read_inputs(config)
    manifest = rundir.manifest(config, pools=inputs.pools, data=inputs.data)
    folder = RunFolder.create(path, config, manifest)
    return _finish(config, inputs, folder, machine, quiet)


def continue_run(path: Path, method: str, machine: Machine, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Continue a run from its last checkpoint, with its own configuration; any machine will do.

    Raises UsageError where there is no such run, or the pool or data are not the ones it began with.
    """
    folder = RunFolder.open(path)
    config = folder.config()
    if config.name != method:
        raise UsageError(f"{path}: is a run of {config.name}, not of {method}")
    inputs = driver.read_inputs(config)
    began = folder.manifest()
    for kind, now in (("pool", inputs.pools), ("data", inputs.data)):
        for then, one in zip(began[kind], now, strict=True):
            if then != one:
                raise UsageError(f"{path}: the {kind} has changed since the run began ({one}); start a new run")
    return _finish(config, inputs, folder, machine, quiet)


def _finish(
    config: RunConfig, inputs: driver.Inputs, folder: RunFolder, machine: Machine, quiet: bool
) -> list[dict[str, Any]]:
    rows = driver.run(config, inputs, folder, machine, Progress(quiet=quiet))
    report.write(folder.path)
    return rows
