"""The methods by name, as the command line takes them. A new method is a module or a folder, and a line here."""

from typing import Any

from ray_dfml.methods import baselines, bidf, dro, free, oracle, ota, purer
from ray_dfml.methods.base import Method

UNTRAINED = "random"
"""The method that trains nothing. Every run scores it beside its own method, so that no number stands alone."""

METHODS: dict[str, Method[Any]] = {
    "free": free.METHOD,
    "purer": purer.METHOD,
    "bidf-mkd": bidf.METHOD,
    UNTRAINED: baselines.RANDOM,
    "best-model": baselines.BEST_MODEL,
    "average": baselines.AVERAGE,
    "ota": ota.METHOD,
    "dro": dro.METHOD,
    "maml-oracle": oracle.METHOD,
}
"""Name of a method -> the method."""
