"""The gateway of a run as an actor on the driver's node, and the same gateway as a shard sees it.

Ray restarts the actor if its process dies, from the ledger on the disk, and repeats the calls that were lost. This is
safe: what was answered is not sent again, and what was sent stays counted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml.errors import ResourceError, UsageError
from ray_dfml.runtime.accounts import Accounts
from ray_dfml.runtime.dispatch import cause
from ray_dfml.runtime.ray_environment import OnNode, exceptions, ray
from ray_dfml.types import Claim, Spent

CALLS = 256
"""Calls that the actor works on at a time, each in a thread that mostly waits. More of them queue."""

DEATHS = 20
"""Deaths of the actor's process within one call that end the run."""

CLOSE_SECONDS = 60.0
"""Longest wait for answers on their way when a run ends."""


class GatewayActor:
    """A gateway in a process of its own."""

    def __init__(self, accounts: Accounts, folder: Path) -> None:
        self._accounts = accounts
        self._gateway = accounts.gateway(folder)

    def check_keys(self) -> None:
        """Raise UsageError if a key is missing here; a cluster that runs already has an environment of its own."""
        try:
            self._accounts.check_keys()
        except UsageError as error:
            raise UsageError(f"in the environment of the Ray cluster: {error}") from None

    def call(self, name: str, *args: Any) -> Any:
        """Call a method of the gateway."""
        return getattr(self._gateway, name)(*args)


class RayGateway:
    """The `Gateway` behind an actor. It may be sent to other processes."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def start(cls, accounts: Accounts, folder: Path, node: str) -> "RayGateway":
        """Start the actor on a node, and wait until its ledger is open.

        Raises what `Accounts.gateway` raises, and UsageError if a key is missing in the actor's environment.
        """
        accounts.gateway(folder).close()  # what is wrong with the ledger is said here, in one line
        made: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=DEATHS)(GatewayActor)
        placed = made.options(scheduling_strategy=OnNode(node, soft=False), max_concurrency=CALLS)
        gateway = cls(placed.remote(accounts, folder))
        try:
            gateway._get(gateway._actor.check_keys.remote())
        except BaseException:
            gateway.close()
            raise
        return gateway

    def _call(self, name: str, *args: Any) -> Any:
        return self._get(self._actor.call.remote(name, *args))

    def _get(self, call: Any) -> Any:
        try:
            return ray.get(call)
        except exceptions.RayTaskError as error:
            raise cause(error) from error
        except exceptions.RayActorError as error:
            raise ResourceError(f"the gateway to services is gone: {str(error).splitlines()[0]}") from None

    def ask(self, teacher: str, images: np.ndarray) -> np.ndarray:
        """See `types.Gateway.ask`."""
        return self._call("ask", teacher, images)

    def claim(self, teacher: str, hashes: Sequence[bytes]) -> Claim:
        """See `types.Gateway.claim`."""
        return self._call("claim", teacher, hashes)

    def settle(self, claim: int, answers: np.ndarray) -> None:
        """See `types.Gateway.settle`."""
        self._call("settle", claim, answers)

    def totals(self) -> dict[str, Spent]:
        """See `types.Gateway.totals`."""
        return self._call("totals")

    def export(self, path: Path) -> None:
        """Write `ledger.jsonl`, on the node of the actor."""
        self._call("export", path)

    def close(self) -> None:
        """Let the gateway keep the answers on their way, then end its process."""
        try:
            ray.get(self._actor.call.remote("close"), timeout=CLOSE_SECONDS)
        except (exceptions.RayError, exceptions.GetTimeoutError):
            pass  # the ledger on the disk is whole at any time
        finally:
            ray.kill(self._actor)
