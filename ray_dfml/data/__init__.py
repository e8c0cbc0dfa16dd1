"""Image sets: where the pixels of teachers' training, of validation and of meta-test come from."""

from ray_dfml.data.datasets import ImageSet, describe, load
from ray_dfml.data.specs import DATASETS, Entry

__all__ = ["DATASETS", "Entry", "ImageSet", "describe", "load"]
