"""The methods by name, as the command line takes them. A new method is a module or a folder, and a line here."""

from typing import Any

from ray_dfml.methods import baselines, bidf, distillers, dro, free, ideal, no_pool, oracle, ota, purer, shared_answers
from ray_dfml.methods.base import Method

UNTRAINED = "random"
"""The method that trains nothing. Every run scores it beside its own method, so that no number stands alone."""

CONTROL = "no-pool"
"""The method that has no teacher. Reports show what each method gains over it, where it was run."""

METHODS: dict[str, Method[Any]] = {
    "free": free.METHOD,
    "purer": purer.METHOD,
    "bidf-mkd": bidf.METHOD,
    "shared-answers": shared_answers.METHOD,
    "ideal": ideal.METHOD,
    UNTRAINED: baselines.RANDOM,
    CONTROL: no_pool.METHOD,
    "best-model": baselines.BEST_MODEL,
    "average": baselines.AVERAGE,
    "ota": ota.METHOD,
    "dro": dro.METHOD,
    "maml-oracle": oracle.METHOD,
    "dfme": distillers.DFME,
    "dafl": distillers.DAFL,
    "zskt": distillers.ZSKT,
    "deepinversion": distillers.DEEPINVERSION,
    "cmi": distillers.CMI,
    "dast": distillers.DAST,
    "zsdb3": distillers.ZSDB3,
}
"""Name of a method -> the method."""
