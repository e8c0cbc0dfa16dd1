"""Settings that the presets for 28x28 characters share, whatever the method."""

from typing import Any

REPLAY: dict[str, Any] = {"shot": 1, "tasks": 4, "inner_lr": 0.1}
"""Cheap meta-updates that suit small images. With inner steps of 0.01 the learner would hardly move."""

STEP: dict[str, Any] = {"lr": 0.1}
"""The step size at test of runs in which no validation data choose one: the same as that of the inner loop."""
