"""Data-free meta-learning: a pool of classifiers, without their training data, becomes one few-shot learner.

A method that distils makes a student of each classifier instead. The public names are
`from ray_dfml import Learner, Pool, Student, train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_dfml.data.pool import Pool
    from ray_dfml.learner import Learner
    from ray_dfml.runtime.launch import train
    from ray_dfml.student import Student

__all__ = ["Learner", "Pool", "Student", "train"]

_HOMES = {
    "Pool": "ray_dfml.data.pool", "Learner": "ray_dfml.learner", "Student": "ray_dfml.student",
    "train": "ray_dfml.runtime.launch",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Names are loaded on first use, so that importing a part does not load the rest."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ray_dfml' has no attribute {name!r}")
