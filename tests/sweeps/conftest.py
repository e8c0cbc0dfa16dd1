"""Sweeps of tests: FREE on the toy images, in a space of two points."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runtime import toy

collect_ignore = [] if importlib.util.find_spec("ray") else ["test_sweep.py"]


@pytest.fixture
def sweep_file(tmp_path: Path, toy_pool: Path, toy_data: str) -> Callable[..., Path]:
    """sweep_file(**changes) -> the file of a sweep of FREE over two numbers of steps."""

    def write(**changes: Any) -> Path:
        settings: dict[str, Any] = {}
        for text in toy.SETTINGS["free"]:
            key, _, value = text.partition("=")
            place = settings
            *path, last = key.split(".")
            for part in path:
                place = place.setdefault(part, {})
            place[last] = yaml.safe_load(value)
        del settings["method"]["steps"]
        tree = {
            "method": "free", "pool": str(toy_pool), "data": toy_data, "seeds": 1, "set": settings,
            "space": {"method": {"steps": {"grid": [1, 2]}}},
        }  # fmt: skip
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(tree | changes))
        return path

    return write
