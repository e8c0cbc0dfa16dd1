"""The one place that imports Ray, after the variables that Ray reads once, at import: authentication on, telemetry
off.

Without RAY_ADDRESS a private cluster is started on this machine. Ray's own processes listen on every interface,
whatever address they are given, so it is guarded by a token that lives as long as this process. A cluster that exists
already sets RAY_AUTH_MODE and its token itself; what the user has set is never changed.

Ray prints one line at the start of a run, that shards have constructor arguments in the object store: those are the
teachers, which would be lost with their owner. The owner is the driver, which outlives its shards.
"""

import os
import secrets

if "RAY_AUTH_MODE" not in os.environ and not os.environ.get("RAY_ADDRESS"):
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import ray
from ray import exceptions

__all__ = ["exceptions", "ray"]
