"""Preflight: each thing that does not fit is one line, and a cluster of one good node is fit."""

import http.server
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.errors import ResourceError
from ray_dfml.runtime import cluster, preflight
from ray_dfml.runtime.preflight import Finding
from ray_dfml.runtime.ray_environment import exceptions, ray
from tests.runtime import toy

Command = Callable[..., toy.Done]


@contextmanager
def answering(code: int) -> Iterator[str]:
    """A web server at this machine alone that answers everything with one status; its HOST:PORT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert "Authorization" not in self.headers
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_versions_that_differ_are_named_with_the_node() -> None:
    here = preflight.versions()
    assert here["ray-dfml"] != "missing"
    assert preflight.differences(here, {"node a": here}) == []
    (line,) = preflight.differences(here, {"node a": here, "node b": here | {"torch": "1.0", "ray-dfml": "missing"}})
    assert line == (
        f"node b has ray-dfml missing instead of {here['ray-dfml']}, torch 1.0 instead of {here['torch']}; "
        "use one image for all nodes"
    )


def test_a_clock_that_is_wrong() -> None:
    assert preflight.skews(100.0, 101.0, {"a": 71.0, "b": 131.0, "c": 100.5}) == []
    assert preflight.skews(100.0, 101.0, {"a": 60.0, "b": 141.0}) == [
        "a: its clock is 40 s off; synchronise it", "b: its clock is 40 s off; synchronise it",
    ]  # fmt: skip


@pytest.mark.parametrize("code", [401, 403])
def test_a_dashboard_that_wants_a_token(code: int) -> None:
    with answering(code) as url:
        assert preflight.dashboard(url).ok


def test_a_dashboard_without_a_token_is_fine_at_its_own_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200) as url:
        assert preflight.dashboard(url).ok
        monkeypatch.setattr(preflight, "_listens", lambda _port: True)
        found = preflight.dashboard(url)
    assert (found.ok, found.fatal) == (False, False)
    assert "asks for no token and listens beyond its own machine" in found.text
    monkeypatch.setattr(preflight, "_ask", lambda _url: 200)
    assert not preflight.dashboard("10.0.0.1:8265").ok


def test_a_dashboard_that_cannot_be_reached() -> None:
    with answering(200) as url:
        pass
    found = preflight.dashboard(url)
    assert (found.ok, found.fatal) == (False, True)
    assert f"the dashboard at {url} cannot be reached from here: [Errno 111] Connection refused" in found.text


def test_a_run_is_refused_in_one_line_or_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("a", True, "good"), Finding("b", False, "open", fatal=False)]
    monkeypatch.setattr(preflight, "examine", lambda: found)
    assert preflight.require() == found[1:]
    found += [Finding("c", False, "node x is old"), Finding("d", False, "node y is late")]
    with pytest.raises(ResourceError, match="is not fit for a run: node x is old; node y is late") as caught:
        preflight.require()
    assert caught.value.exit_code == 5


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_checks_a_cluster(tmp_path: Path, command: Command) -> None:
    done = command("check", "--workers", 2, "--storage", tmp_path)
    lines = [line.split()[:2] for line in done.out.splitlines()]
    checks = ["resources", "nodes", "versions", "clocks", "transfers", "storage", "token"]
    assert (done.code, done.err, lines) == (0, "", [["ok", name] for name in checks])
    assert list(tmp_path.iterdir()) == []
    done = command("check", "--workers", 99, "--storage", tmp_path / "none")
    failures = [line for line in done.out.splitlines() if line.startswith("FAIL")]
    assert (done.code, done.err) == (5, "ray-dfml: check: resources, storage: not fit for a run\n")
    assert "99 shards need 99 CPU, the cluster has 2" in failures[0]
    assert "No such file or directory" in failures[1]
    assert len(failures) == 2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_node_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "NODE_SECONDS", 0.2)
    monkeypatch.setattr(preflight, "_say", lambda: time.sleep(3))
    found = {one.check: one for one in preflight.examine()}
    assert not found["nodes"].ok
    assert "does not answer within 0.2 s" in found["nodes"].text


def test_a_transfer_that_fails_is_one_line_also_where_nodes_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"a": "node 10.0.0.1 (host)", "b": "node 10.0.0.1 (host)", "c": "node 10.0.0.11 (host)"}
    monkeypatch.setattr(preflight, "_on", lambda id, _: f"object of {id}")

    def each(_: object, calls: dict[str, tuple[object, str]]) -> tuple[dict[str, float], dict[str, str]]:
        assert {id: call[1] for id, call in calls.items()} == {
            "a": "object of c", "b": "object of a", "c": "object of b",
        }  # fmt: skip
        return {"b": 1.0, "c": 1.0}, {"a": f"{names['a']}: lost"}

    monkeypatch.setattr(preflight, "_each", each)
    assert preflight._transfers(names) == ["fetching from node 10.0.0.11 (host): node 10.0.0.1 (host): lost"]


def test_a_node_that_is_gone_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*_: object, **__: object) -> None:
        raise exceptions.NodeDiedError("Task failed because the node is dead. Node IP: 10.0.0.2, use `ray list nodes`.")

    monkeypatch.setattr(preflight, "_on", lambda *_: None)
    monkeypatch.setattr(preflight.ray, "get", get)
    assert preflight._each({"a": "node a"}, {"a": (len, "")}) == (
        {}, {"a": "node a: Task failed because the node is dead"},
    )  # fmt: skip


@pytest.fixture
def second_node(ray_cluster: Any) -> Iterator[str]:
    """The address of a node that joins the session's Ray, and leaves it again."""
    address = "127.0.0.2"
    node = ray_cluster.add_node(num_cpus=1, node_ip_address=address, object_store_memory=80 * 2**20)
    yield address
    ray_cluster.remove_node(node)
    while sum(node["Alive"] for node in ray.nodes()) > 1:
        time.sleep(0.05)


@pytest.mark.ray
def test_the_command_checks_several_nodes(
    tmp_path: Path, second_node: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "NODE_SECONDS", 600.0)  # a busy machine takes its time to start two processes
    done = command("check", "--workers", 3, "--storage", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "ok   nodes      2 of 2 answer" in done.out

    def say() -> dict[str, Any]:
        """The second node's clock is an hour behind, and its torch is old."""
        said = plain()
        if ray.util.get_node_ip_address() != second_node:
            return said
        return said | {"time": said["time"] - 3600, "versions": said["versions"] | {"torch": "1.0"}}

    def read(path: Path) -> str:
        """The second node does not see the folder."""
        if ray.util.get_node_ip_address() == second_node:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return path.read_text()

    plain = preflight._say
    monkeypatch.setattr(preflight, "_say", say)
    monkeypatch.setattr(preflight, "_read", read)
    done = command("check", "--workers", 3, "--storage", tmp_path)
    failures = {line.split()[1]: line for line in done.out.splitlines() if line.startswith("FAIL")}
    assert (done.code, [*failures]) == (5, ["versions", "clocks", "storage"])
    assert all(line.count("node ") == line.count(f"node {second_node} (") == 1 for line in failures.values())
    assert list(tmp_path.iterdir()) == [], "what the check wrote is removed"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_has_looked_at_its_cluster_can_still_be_stopped() -> None:
    """By SIGTERM, as from `ray job stop`: the handler of Ray, which ends the process, is not left in place."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        preflight.require()
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_room_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of a cluster that has just been made are on their way."""
    tries = iter([ResourceError("too small"), ResourceError("too small"), None])

    def size(*_: object) -> None:
        if error := next(tries):
            raise error

    monkeypatch.setattr(cluster, "connect", lambda *_: False)
    monkeypatch.setattr(cluster, "_check_size", size)
    monkeypatch.setattr(cluster.time, "sleep", lambda _: None)
    monkeypatch.setattr(preflight, "examine", lambda _: [])
    assert [one.ok for one in cluster.examine(workers=2, gpus_per_worker=0, storage=None, seconds=60)] == [True]
    tries = iter([ResourceError("too small")])
    (found,) = cluster.examine(workers=2, gpus_per_worker=0, storage=None, seconds=0)
    assert (found.ok, found.text) == (False, "too small")
