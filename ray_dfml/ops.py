"""The work a shard can do, by name."""

from collections.abc import Callable, Sequence
from typing import Any

from ray_dfml import evaluate
from ray_dfml.data import pretrain
from ray_dfml.methods import METHODS, baselines, replay
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.purer import eci
from ray_dfml.types import Arrays, Job

Op = Callable[[Any, Sequence[Job], Arrays], list[Arrays]]

OPS: dict[str, Op] = {
    "pretrain": pretrain.pretrain,
    "evaluate": evaluate.evaluate,
    "weights": baselines.weights,
    "maml.grad": replay.grad,
    "purer.grad": eci.grad,
    "bidf.grad": bidf.grad,
    **{f"{name}.recover": method.recover for name, method in METHODS.items()},
}
"""Name -> function (worker, jobs, shared) -> one result per job, in order."""
