"""Fixtures of the tests of methods."""

from collections.abc import Iterator

import pytest

from ray_dfml.methods.surrogates.config import SurrogateConfig


@pytest.fixture(scope="module")
def short_surrogates() -> Iterator[None]:
    """Students take a step or two instead of hundreds."""
    full = SurrogateConfig.distillation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SurrogateConfig, "distillation", property(
            lambda own: full.fget(own).model_copy(update={"steps": 0.1, "last_steps": 2, "candidates": 1.0})
        ))  # fmt: skip
        yield
