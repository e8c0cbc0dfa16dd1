"""The one place that imports Ray, after the variables that Ray reads once, at import: authentication on, telemetry
off, of its processes' own log only errors.

Without RAY_ADDRESS a private cluster is started on this machine. Ray's own processes listen on every interface,
whatever address they are given, so it is guarded by a token that lives as long as this process. A cluster that exists
already sets RAY_AUTH_MODE and its token itself; what the user has set is never changed.

The log's warnings go to the user's terminal. One comes with every run: a shard's first teachers are in the object
store, and lost if their owner is; here the owner is the driver, which outlives its shards.
"""

import os
import secrets

if "RAY_AUTH_MODE" not in os.environ and not os.environ.get("RAY_ADDRESS"):
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import ray
from ray import exceptions

__all__ = ["exceptions", "ray"]
