"""Ray Tune: the only module that imports it. It runs tasks, each in one placement group, and reads nothing back.

What a trial has done is in its run folder. Tune's own files lie in `tune/` of the sweep; its loggers write TensorBoard
events, CSV and JSON there. Tune also writes pickles there, which nothing here reads.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from ray_dfml.errors import DfmlError, ResourceError
from ray_dfml.runtime import preflight
from ray_dfml.runtime.cluster import connect
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.ray_environment import ray
from ray_dfml.sweeps import trial
from ray_dfml.sweeps.spec import Scheduler
from ray_dfml.sweeps.trial import Task

os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

from ray import tune
from ray.tune.schedulers import ASHAScheduler

METRIC = "validation"
FAILURES = 2
"""How often the process of a trial may die. The trial goes on from its last checkpoint."""

OnEnd = Callable[[Task, str | None], None]
"""Gets a task that has ended, and the error if it failed."""


def bundles(machine: Machine) -> list[dict[str, float]]:
    """The placement group of a trial: its own process, which mostly waits, and one bundle for each shard."""
    if machine.backend == "local":
        return [{"CPU": 1.0}]
    gpu = {"GPU": machine.gpus_per_worker} if machine.gpus_per_worker else {}
    return [{}, *[{"CPU": 1.0} | gpu] * machine.workers]


@contextmanager
def connected(machine: Machine) -> Iterator[None]:
    """Be connected to Ray in the `with` block: to the cluster of RAY_ADDRESS, or to one of this machine's own.

    A cluster is examined first, as before a run. Raises ResourceError if there is none, if it is not fit, or if it can
    never hold the group of one trial.
    """
    new = connect(0, 0.0)
    try:
        if new and os.environ.get("RAY_ADDRESS"):
            preflight.announce()
        check_room(machine)
        yield
    finally:
        if new:
            ray.shutdown()


def check_room(machine: Machine) -> None:
    """Raise ResourceError, with the shortfall, if the group of one trial can never fit in the cluster."""
    wanted = [bundle for bundle in bundles(machine) if bundle]
    free = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    placed = 0
    for bundle in wanted:
        node = next((n for n in free if all(n.get(name, 0.0) >= x for name, x in bundle.items())), None)
        if node is None:
            break
        placed += 1
        for name, x in bundle.items():
            node[name] -= x
    if placed < len(wanted):
        each = " and ".join(f"{x:g} {name}" for name, x in wanted[0].items())
        have = ray.cluster_resources()
        there = ", ".join(f"{have.get(name, 0.0):g} {name}" for name in wanted[0])
        raise ResourceError(
            f"a trial needs {len(wanted)} shards of {each}, and the cluster has room for {placed} ({there} in all): "
            f"{len(wanted) - placed} too few; lower `workers` or `gpus_per_worker`, or add nodes"
        )


def _run_task(config: dict[str, Any], tasks: Sequence[Task]) -> None:
    """A trial. Only the death of its process fails for Tune, which then begins it again; an error would come again."""
    task = tasks[config["task"]]

    def tell(row: Mapping[str, Any]) -> bool:
        try:
            tune.report(dict(row))
        except SystemExit:  # how Tune ends the thread of a trial that its scheduler stops
            return False
        return True

    try:
        if task.test:
            trial.test(task)
            tune.report({"tested": 1})  # a trial without a result is a matter for Tune to print
        else:
            trial.train(task, tell)
    except Exception as error:
        tune.report({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


class _Ends(tune.Callback):
    """Passes on which trials have ended."""

    def __init__(self, tasks: Sequence[Task], on_end: OnEnd) -> None:
        self._tasks, self._on_end = tasks, on_end

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._on_end(self._tasks[trial.config["task"]], trial.last_result.get("error"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._on_end(self._tasks[trial.config["task"]], f"its process died {FAILURES + 1} times")


def tracking(names: Sequence[str], folder: Path) -> list[tune.Callback]:
    """Ray Tune's callbacks for MLflow and Weights & Biases, whose experiment is called after the folder of the sweep.

    MLflow writes to the server of MLFLOW_TRACKING_URI, or to `mlflow.db` in `folder`. Weights & Biases writes to
    `wandb` there and sends nothing, since Ray would hand its key from process to process; `wandb sync` sends it later.
    """
    name, found = folder.parent.name, list[tune.Callback]()
    if "mlflow" in names:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        found.append(MLflowLoggerCallback(place, experiment_name=name))
    if "wandb" in names:
        os.environ["WANDB_MODE"] = "offline"
        from ray.air.integrations.wandb import WandbLoggerCallback

        files = folder / "wandb"
        files.mkdir(parents=True, exist_ok=True)
        found.append(WandbLoggerCallback(name, mode="offline", dir=str(files)))
    return found


def run(
    tasks: Sequence[Task], folder: Path, scheduler: Scheduler, *, rounds: int, concurrent: int | None, on_end: OnEnd,
    trackers: Sequence[str] = (),
) -> None:  # fmt: skip
    """Run tasks to their ends under a scheduler. `rounds` is the most that one of them has.

    Ray must be connected. A task whose process dies is tried again; one that fails is told to `on_end`, and the others
    go on. Tune's files go to a new folder below `folder`. `trackers` are `mlflow` and `wandb`, which get figures too.
    """
    asha = ASHAScheduler(
        time_attr="round", max_t=max(rounds, scheduler.grace), grace_period=scheduler.grace,
        reduction_factor=scheduler.reduction, stop_last_trials=False,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tasks = list(tasks)

    def chosen(values: Any) -> Mapping[str, Any]:
        return dict(tasks[values.config["task"]].shown)

    number = 1 + max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
    group = tune.PlacementGroupFactory(bundles(tasks[0].machine))
    function = tune.with_resources(tune.with_parameters(_run_task, tasks=tasks), group)
    tuner = tune.Tuner(
        function,
        param_space={
            "task": tune.grid_search(list(range(len(tasks)))),
            "trial": tune.sample_from(chosen),
        },
        tune_config=tune.TuneConfig(
            metric=METRIC, mode="max", scheduler=asha if scheduler.type == "asha" else None,
            max_concurrent_trials=concurrent, reuse_actors=True,
            trial_name_creator=lambda one: tasks[one.config["task"]].path.name,
            trial_dirname_creator=lambda one: tasks[one.config["task"]].path.name,
        ),
        run_config=tune.RunConfig(
            name=str(number), storage_path=str(folder), verbose=0,
            callbacks=[_Ends(tasks, on_end), *tracking(trackers, folder)],
            failure_config=tune.FailureConfig(max_failures=FAILURES),
        ),
    )  # fmt: skip
    try:
        with redirect_stdout(sys.stderr):
            tuner.fit()
    except tune.TuneError as error:
        raise DfmlError(f"Ray Tune: {' '.join(str(error).split())}") from None
