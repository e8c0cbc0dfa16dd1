"""Data-free meta-learning: from a pool of classifiers whose training data nobody has, to one few-shot learner.

from ray_dfml import Pool, train, Learner
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_dfml.data.pool import Pool
    from ray_dfml.learner import Learner
    from ray_dfml.runtime.launch import train

__all__ = ["Learner", "Pool", "train"]

_HOMES = {"Pool": "ray_dfml.data.pool", "Learner": "ray_dfml.learner", "train": "ray_dfml.runtime.launch"}


def __getattr__(name: str) -> Any:
    """Names are loaded on first use, so that importing a part does not load the rest."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ray_dfml' has no attribute {name!r}")
