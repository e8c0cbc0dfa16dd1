"""The methods, by the name the command line takes. Adding one is a module and a line here."""

from typing import cast

from ray_dfml.methods import baselines, dro, oracle, ota
from ray_dfml.methods.base import Method
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.free import method as free
from ray_dfml.methods.purer import method as purer

METHODS: dict[str, Method] = {
    "free": cast(Method, free),
    "purer": cast(Method, purer),
    "bidf-mkd": cast(Method, bidf),
    "random": baselines.RANDOM,
    "best-model": baselines.BEST_MODEL,
    "average": baselines.AVERAGE,
    "ota": ota.OTA,
    "dro": cast(Method, dro),
    "maml-oracle": cast(Method, oracle),
}
"""Name -> module with the functions of `base.Method`."""
