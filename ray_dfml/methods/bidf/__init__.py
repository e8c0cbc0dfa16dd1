"""BiDf-MKD. Its settings are `config`, the method is `method`."""
