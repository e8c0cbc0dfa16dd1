"""The one place that imports Ray, after the variables that Ray reads once, at import: authentication on, telemetry
off.

Without RAY_ADDRESS a private cluster is started on this machine. Ray's own processes listen on every interface,
whatever address they are given, so it is guarded by a token that lives as long as this process. A cluster that exists
already sets RAY_AUTH_MODE and its token itself; what the user has set is never changed.

Where the user's code imported Ray before, it has read its environment already, and what is set now would reach only
its daemons: nothing is set.
"""

import os
import secrets
import sys

IMPORTED_BEFORE = "ray" in sys.modules
"""Whether Ray was imported before this file could prepare its environment."""

if not IMPORTED_BEFORE:
    if "RAY_AUTH_MODE" not in os.environ and not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # one takes 40 s where no cluster answers; Ray has 20
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import ray  # noqa: E402
from ray import exceptions  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode  # noqa: E402

__all__ = ["IMPORTED_BEFORE", "OnNode", "exceptions", "ray"]
