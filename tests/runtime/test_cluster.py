"""Starting and leaving a cluster, with stand-ins for Ray: whatever fails or is broken off, nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.errors import ResourceError
from ray_dfml.runtime import cluster, host
from ray_dfml.runtime.accounts import Accounts
from ray_dfml.runtime.cluster import Cluster
from ray_dfml.runtime.inputs import Teachers
from ray_dfml.runtime.stalls import BOARD, AtWork, Board

MB = 10**6


class Actor:
    """An actor handle whose readiness is the name of what `get` does with it."""

    def __init__(self) -> None:
        self.__ray_ready__ = self

    def remote(self, *_: object, **__: object) -> str:
        return "ready"


class StandIn:
    """A Ray of two processors that can be started, and whose `get` a test replaces."""

    ObjectRef = str

    def __init__(self, get: Callable[..., Any]) -> None:
        self.get = get
        self.up, self.killed, self.started = False, 0, 0

    def is_initialized(self) -> bool:
        return self.up

    def init(self, **_: object) -> None:
        self.up = True

    def shutdown(self) -> None:
        self.up = False

    def kill(self, actor: Actor) -> None:
        self.killed += 1

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    available_resources = cluster_resources

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **_: object) -> Callable[[type], Any]:
        def wrap(_: type) -> Any:
            class Maker:
                @staticmethod
                def remote(*_: object, **__: object) -> Actor:
                    self.started += 1
                    return Actor()

            return Maker

        return wrap


def failing(error: BaseException) -> Callable[..., Any]:
    def get(*_: object, **__: object) -> Any:
        raise error

    return get


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    def stand_in(get: Callable[..., Any] = lambda *_, **__: None) -> StandIn:
        one = StandIn(get)
        monkeypatch.setattr(cluster, "ray", one)
        return one

    return stand_in


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (cluster.exceptions.GetTimeoutError("late"), ResourceError),
        (cluster.exceptions.RayActorError(error_msg="no torch here"), ResourceError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
@pytest.mark.parametrize("start", [lambda: Cluster(workers=2).__enter__(), lambda: cluster.shards_of(2).__enter__()])
def test_shards_that_do_not_come_up_leave_nothing(
    ray: Callable[..., StandIn], start: Callable[[], Any], error: BaseException, raised: type[BaseException]
) -> None:
    one = ray(failing(error))
    with pytest.raises(raised) as caught:
        start()
    assert (one.up, one.killed, one.started) == (False, 2, 2)
    assert "\n" not in str(caught.value)


def test_a_ray_that_was_there_before_stays(ray: Callable[..., StandIn]) -> None:
    one = ray(failing(cluster.exceptions.GetTimeoutError("late")))
    one.up = True
    with pytest.raises(ResourceError, match="2 shards of 1 CPU and 0 GPU did not start in 180 s"):
        Cluster(workers=2).__enter__()
    assert (one.up, one.killed) == (True, 2)


def test_a_store_that_cannot_be_filled_leaves_nothing(ray: Callable[..., StandIn]) -> None:
    one = ray()
    one.put = failing(OSError(28, "No space left on device"))  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space"):
        cluster.RaySession({}, None, [], Teachers({}), Path(), Accounts(), Cluster(workers=2))  # type: ignore[arg-type]
    assert (one.up, one.killed) == (False, 2)


def test_sigterm_during_the_wait_for_shards_is_an_interrupt(ray: Callable[..., StandIn]) -> None:
    """The handler of Ray, which ends the process, is not left in place by the connection."""

    def wait(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    one = ray(wait)
    one.init = lambda **_: (setattr(one, "up", True), signal.signal(signal.SIGTERM, lambda *_: os._exit(77)))  # type: ignore[method-assign,func-returns-value]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            Cluster(workers=1).__enter__()
        assert signal.getsignal(signal.SIGTERM) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not one.up


def test_a_cluster_may_start_in_a_thread(ray: Callable[..., StandIn]) -> None:
    """Only the main thread may touch signals."""
    one, failed = ray(), []

    def start() -> None:
        try:
            Cluster(workers=1).__enter__()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert (one.up, failed) == (True, [])


def test_a_cluster_that_starts_beside_other_work_is_waited_for_and_stopped(ray: Callable[..., StandIn]) -> None:
    go = threading.Event()
    one = ray(lambda *_, **__: go.wait(30))
    with cluster.starting(Cluster(workers=2)) as ready:
        assert not go.is_set(), "the block is entered at once"
        go.set()
        assert len(ready().shards) == 2
        assert one.up
    assert (one.up, one.killed) == (False, 2)


def test_a_start_that_fails_beside_other_work_says_so_when_it_is_needed(ray: Callable[..., StandIn]) -> None:
    one = ray(failing(cluster.exceptions.GetTimeoutError("late")))
    with cluster.starting(Cluster(workers=2)) as ready, pytest.raises(ResourceError, match="did not start"):
        ready()
    assert (one.up, one.killed) == (False, 2)


def test_work_that_fails_beside_a_start_stops_it(ray: Callable[..., StandIn]) -> None:
    one = ray()
    with pytest.raises(ZeroDivisionError), cluster.starting(Cluster(workers=2)):
        raise ZeroDivisionError
    assert (one.up, one.killed) == (False, 2)


def test_a_session_leaves_a_cluster_that_was_lent_to_it(ray: Callable[..., StandIn]) -> None:
    one = ray()
    with Cluster(workers=2) as place:
        cluster.RaySession({}, None, [], Teachers({}), Path(), Accounts(), place).close()  # type: ignore[arg-type]
        assert (one.up, one.killed) == (True, 0)
    assert (one.up, one.killed) == (False, 2)


def test_a_learner_that_starts_finds_nothing_at_work(
    ray: Callable[..., StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that was killed while jobs were at work has left its board, and its hours would look like a stall."""
    ray()
    monkeypatch.setattr(cluster, "_node", failing(ZeroDivisionError()))
    with Cluster(workers=2) as place:
        session = cluster.RaySession({}, None, [], Teachers({}), tmp_path, Accounts(), place)  # type: ignore[arg-type]
        Board(tmp_path / BOARD).write([AtWork(0, "op", ("t",), 0.0, 1.0)])
        with pytest.raises(ZeroDivisionError):
            session.start()
        assert session.at_work() == []


@pytest.mark.parametrize(
    ("wanted", "memory", "shared", "size"),
    [
        (600 * MB, 10_000 * MB, 8000 * MB, 600 * MB),
        (6000 * MB, 10_000 * MB, 8000 * MB, 3000 * MB),
        (6000 * MB, 40_000 * MB, 2000 * MB, 1800 * MB),
        (600 * MB, 10_000 * MB, 64 * MB, cluster.LEAST_STORE_BYTES),
    ],
)
def test_the_object_store_is_as_large_as_the_run_needs_and_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, ray: Callable[..., StandIn], wanted: int, memory: int, shared: int, size: int
) -> None:
    one, given = ray(), []
    one.init = lambda **options: given.append(options)  # type: ignore[method-assign]
    monkeypatch.setattr(host, "memory", lambda: memory)
    monkeypatch.setattr(host, "shared_memory", lambda: shared)
    cluster.connect(1, 0.0, store_bytes=wanted)
    assert given[0]["object_store_memory"] == size


def test_a_learner_on_a_device_needs_one_where_the_command_runs(ray: Callable[..., StandIn]) -> None:
    one = ray()
    with pytest.raises(ResourceError, match=r"1 shards and a learner of 0.5 GPU need 0.5 GPU, the cluster has 0; "):
        cluster.connect(1, 0.0, 0.5)
    one.cluster_resources = lambda: {"CPU": 2.0, "GPU": 1.0}  # type: ignore[method-assign]
    nodes = [{"NodeID": "other", "Resources": {"GPU": 1.0}}, {"NodeID": "here", "Resources": {}}]
    one.nodes, one.get_runtime_context = lambda: nodes, lambda: one  # type: ignore[attr-defined]
    one.get_node_id = lambda: "here"  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match=r"--gpus-per-learner 0.5: the learner runs on the node of this command"):
        cluster.connect(1, 0.0, 0.5)
    assert not one.up
    nodes[1]["Resources"] = {"GPU": 1.0}
    assert cluster.connect(1, 0.0, 0.5)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "http://127.0.0.1:8265",
            r"RAY_ADDRESS=http://127.0.0.1:8265 is not the address of .* HOST:PORT.*ray job submit",
        ),
        ("ray://head:10001", "is not the address of a cluster's head"),
        ("head", r"RAY_ADDRESS=head has no port: a run joins"),
        ("127.0.0.1:99999", "nobody answers there"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, ray: Callable[..., StandIn], address: str, message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    one = ray()
    with pytest.raises(ResourceError, match=message) as error:
        cluster.connect(1, 0.0)
    assert (error.value.exit_code, one.up) == (5, False)
    assert "\n" not in str(error.value)


def test_an_address_where_nobody_answers_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, ray: Callable[..., StandIn]
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        free = bound.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free}")
    ray()
    began = time.monotonic()
    with pytest.raises(ResourceError, match=rf"127.0.0.1:{free}: nobody answers there \(Connection refused\)"):
        cluster.connect(1, 0.0)
    assert time.monotonic() - began < cluster.ADDRESS_SECONDS


IMPORTED_FIRST = """
import os
import ray
from ray_dfml.runtime import cluster
assert cluster.connect(1, 0.0)
print(ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=60))
ray.shutdown()
"""


@pytest.mark.ray
def test_a_program_that_imported_ray_first_can_start_a_cluster() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_FIRST], capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.stdout.split() == ["42"], done.stderr
    assert "ray was imported before ray_dfml" in done.stderr
