"""All work that a shard can do, by name."""

from typing import Any

from ray_dfml import evaluate, top1
from ray_dfml.data import pretrain
from ray_dfml.methods import METHODS, baselines, replay
from ray_dfml.methods.base import Method, Op


def of_method(name: str, method: Method[Any]) -> dict[str, Op]:
    """The ops of one method: `NAME.recover` if the method recovers, and the further ops that it brings."""
    return ({} if method.recover is None else {f"{name}.recover": method.recover}) | dict(method.ops)


OPS: dict[str, Op] = {
    "pretrain": pretrain.pretrain,
    "evaluate": evaluate.evaluate,
    "top1": top1.top1,
    "weights": baselines.weights,
    "maml.grad": replay.grad,
    **{op: function for name, method in METHODS.items() for op, function in of_method(name, method).items()},
}
"""Name -> function (shard, jobs, shared) -> one result per job, in order."""
