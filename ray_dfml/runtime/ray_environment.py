"""The only module that imports Ray. Before that, it sets variables that Ray reads once, when it is imported.

They switch authentication on and telemetry off. Without RAY_ADDRESS a private cluster is started on this machine. Its
processes listen on every interface, whatever address they are given, so a token guards them that lives as long as this
process. With RAY_ADDRESS the cluster has its own authentication. What the user has set is never changed.

If other code has imported Ray before, Ray has already read its environment. Variables set now would reach only its
daemons, so none is set.
"""

import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

IMPORTED_BEFORE = "ray" in sys.modules
"""Whether Ray was imported before this file could prepare its environment."""

if not IMPORTED_BEFORE:
    if "RAY_AUTH_MODE" not in os.environ and not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # Ray makes 20, of 40 s each if no cluster answers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import ray  # noqa: E402
from ray import exceptions  # noqa: E402
from ray.util.metrics import Gauge  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode  # noqa: E402

__all__ = ["IMPORTED_BEFORE", "Gauge", "OnNode", "exceptions", "keeping_sigterm", "ray"]


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM. `ray.init` sets its own, which ends the process at once, also if it is connected."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
