"""FREE: `config` holds its settings, `method` its functions, `five` the inversion, and `bell` the distillation."""

from ray_dfml.methods.free.method import METHOD as METHOD
