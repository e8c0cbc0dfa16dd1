"""Image sets: where the pixels of teachers' training, of validation and of meta-test come from."""

from ray_dfml.data.datasets import DATASETS, Entry, ImageSet, describe, load

__all__ = ["DATASETS", "Entry", "ImageSet", "describe", "load"]
