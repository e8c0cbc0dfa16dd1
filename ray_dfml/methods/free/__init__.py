"""FREE. Its settings are `config`, the method is `method`; `five` and `bell` are its two parts."""

from ray_dfml.methods.free.method import METHOD as METHOD
