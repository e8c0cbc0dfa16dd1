"""What the presets for 28x28 characters have in common, whatever the method."""

from typing import Any

REPLAY: dict[str, Any] = {"shot": 1, "tasks": 4, "inner_lr": 0.1}
"""Cheap meta-updates that suit small images: with steps of 0.01 the inner loop hardly moves."""

STEP: dict[str, Any] = {"lr": 0.1}
"""The step of their inner loop, for episodes where no validation data choose another one."""
