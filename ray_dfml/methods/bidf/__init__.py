"""BiDf-MKD: `config` holds its settings, and `method` its functions."""

from ray_dfml.methods.bidf.method import METHOD as METHOD
