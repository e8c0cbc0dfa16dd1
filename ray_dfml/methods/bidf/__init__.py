"""BiDf-MKD. Its settings are `config`, the method is `method`."""

from ray_dfml.methods.bidf.method import METHOD as METHOD
