"""PURER: `config` holds its settings, `method` its functions, and `eci` what the shards compute."""

from ray_dfml.methods.purer.method import METHOD as METHOD
