"""Sweeps of tests: FREE on the toy images, in a space of two points."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runtime import toy

collect_ignore = [] if importlib.util.find_spec("ray") else ["test_ray_tune.py", "test_sweep.py", "test_flow.py"]


def small_settings() -> dict[str, Any]:
    """FREE in about a second, nested, without its steps."""
    settings: dict[str, Any] = {}
    for text in toy.SETTINGS["free"]:
        key, _, value = text.partition("=")
        place = settings
        *path, last = key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = yaml.safe_load(value)
    del settings["method"]["steps"]
    return settings


def write_sweep(path: Path, pool: Path, data: str, **changes: Any) -> Path:
    """Write the file of a sweep of FREE over two numbers of steps."""
    tree = {
        "method": "free", "pool": str(pool), "data": data, "seeds": 1, "set": small_settings(),
        "space": {"method": {"steps": {"grid": [1, 2]}}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree | changes))
    return path


class SweepFile:
    """sweep_file(**changes) -> the file of a sweep with other values."""

    def __init__(self, path: Path, pool: Path, data: str) -> None:
        self._arguments = (path, pool, data)

    def __call__(self, **changes: Any) -> Path:
        return write_sweep(*self._arguments, **changes)

    @staticmethod
    def settings() -> dict[str, Any]:
        """What all its trials have."""
        return small_settings()


@pytest.fixture
def sweep_file(tmp_path: Path, toy_pool: Path, toy_data: str) -> SweepFile:
    """Writes the file of a sweep of FREE over two numbers of steps."""
    return SweepFile(tmp_path / "sweep.yaml", toy_pool, toy_data)
