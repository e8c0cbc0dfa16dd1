"""Image sets, pools of teachers, and files of weights: everything that is read from disk before a run."""

from ray_dfml.data.datasets import ImageSet, describe, load
from ray_dfml.data.specs import DATASETS, Entry

__all__ = ["DATASETS", "Entry", "ImageSet", "describe", "load"]
