"""IDEAL: `config` holds its settings, `method` its functions, and its other files what the shards compute."""

from ray_dfml.methods.ideal.method import METHOD as METHOD
