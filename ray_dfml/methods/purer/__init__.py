"""PURER. Its settings are `config`, the method is `method`; `eci` is what the shards do for it."""
