"""The simulated nodes of `chaos.py`: a head for drivers and learners, and nodes for shards that can be killed."""

import logging
import os
import signal
from typing import Any

from ray_dfml.runtime.ray_environment import ray  # first, since it sets what Ray reads when it is imported

from ray.cluster_utils import Cluster  # isort: skip

STORE_BYTES = 128 * 2**20
HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
}  # fmt: skip
"""A node that is gone is noticed after some seconds; Ray's own settings take a quarter of a minute."""


class Nodes:
    """A Ray of a head, which takes no shards, and of two nodes of two processors each. This process is connected."""

    store_bytes = STORE_BYTES
    """Of each node."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
        self._cluster = Cluster(initialize_head=True, head_node_args=head | {"object_store_memory": STORE_BYTES})
        self._last = 1
        self._nodes: list[Any] = [self._cluster.head_node, self._add(), self._add()]
        ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)

    @property
    def address(self) -> str:
        """Where a driver joins."""
        return self._cluster.address

    def _add(self) -> Any:
        """A new node, with an address of its own so that no driver joins there."""
        self._last += 1
        return self._cluster.add_node(
            num_cpus=2, node_ip_address=f"127.0.0.{self._last}", object_store_memory=STORE_BYTES
        )

    def raylets(self) -> list[int]:
        """The process of each node's raylet, whose children are the actors of that node; the head's is the first."""
        return [_raylet(node) for node in self._nodes]

    def replace(self, raylet: int) -> None:
        """Kill a raylet, and let a new node join."""
        os.kill(raylet, signal.SIGKILL)
        node = next(node for node in self._nodes if _raylet(node) == raylet)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes.append(self._add())

    def close(self) -> None:
        """Stop all nodes."""
        ray.shutdown()
        self._cluster.shutdown()


def _raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid
