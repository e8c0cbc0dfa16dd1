"""A stand-in for Ray whose calls end when and how a test of dispatch says."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from ray_dfml.runtime import dispatch
from ray_dfml.runtime.dispatch import RayBackend
from ray_dfml.types import Arrays, Job


class Ref:
    """A call's future: a value, an error, or, with neither, a call that never ends."""

    def __init__(self, value: Any = None, error: Exception | None = None, *, ends: bool = True) -> None:
        self.value, self.error, self.ends, self.taken = value, error, ends, False


class Method:
    """`shard.method` with its `.remote`."""

    def __init__(self, call: Callable[..., Ref]) -> None:
        self.remote = call


class StandIn:
    """The four calls of Ray that dispatch makes."""

    ObjectRef = Ref

    @staticmethod
    def put(value: Any) -> Any:
        return value

    @staticmethod
    def wait(refs: Sequence[Ref], num_returns: int, timeout: float | None) -> tuple[list[Ref], list[Ref]]:
        ended = [ref for ref in refs if ref.ends][:num_returns]
        assert ended or timeout is not None, "dispatch waits for a call that never ends"
        if not ended:
            time.sleep(timeout or 0.0)
        return ended, [ref for ref in refs if ref not in ended]

    @staticmethod
    def kill(shard: "Shard", no_restart: bool) -> None:
        assert not no_restart
        shard.die()

    @staticmethod
    def get(ref: Ref) -> Any:
        ref.taken = True
        if ref.error is not None:
            raise ref.error
        return ref.value


class Shard:
    """A shard that works, or one that is down and never comes up again: every call to it fails at once, as in Ray."""

    def __init__(self, *, up: bool) -> None:
        self.calls: list[list[int]] = []
        self.refs: list[Ref] = []
        self.up = up
        self.run_for = Method(self._run)
        self.__ray_ready__ = Method(lambda: Ref(error=None if self.up else self._gone()))

    def _run(self, load: Sequence[Any], op: str, jobs: Sequence[Job], shared: Arrays) -> Ref:
        self.calls.append([job.index for job in jobs])
        self.refs.append(Ref(([{"index": job.index} for job in jobs], []), None if self.up else self._gone()))
        return self.refs[-1]

    @staticmethod
    def _gone() -> Exception:
        return dispatch.exceptions.ActorUnavailableError("down", None)

    def die(self) -> None:
        """Every call fails whose result was not taken."""
        for ref in self.refs:
            if not ref.taken:
                ref.error, ref.ends = self._gone(), True


def backend_of(shards: Sequence[Any], **options: Any) -> RayBackend:
    """A backend over stand-ins, which need no teachers."""
    return RayBackend(shards, None, **options)  # type: ignore[arg-type]


def jobs(count: int) -> list[Job]:
    return costing(*[1.0] * count)


def costing(*costs: float, memory: int = 0) -> list[Job]:
    return [Job(index=i, seed=i, teacher=f"t{i}", cost=cost, memory=memory) for i, cost in enumerate(costs)]
