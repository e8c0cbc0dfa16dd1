"""The script of `cluster/` that several files of tests run."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "submit.py"


@pytest.fixture
def script() -> Any:
    """`cluster/submit.py` as a fresh module."""
    spec = importlib.util.spec_from_file_location("submit", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
