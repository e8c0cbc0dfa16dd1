"""PURER. Its settings are `config`, the method is `method`; `eci` is what the shards do for it."""

from ray_dfml.methods.purer.method import METHOD as METHOD
