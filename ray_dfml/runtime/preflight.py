"""Looks whether the nodes of a cluster fit together, before work begins: one plain line about each thing that does not.

A small task on each node says what is installed there and what its clock shows, fetches an object from another node,
and writes or reads a file. None of it imports torch.
"""

import importlib.metadata
import logging
import platform
import socket
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml import object_store
from ray_dfml.errors import ResourceError
from ray_dfml.files import Uri
from ray_dfml.runtime.ray_environment import OnNode, exceptions, keeping_sigterm, ray

NODE_SECONDS = 60.0
"""Longest wait for an answer of a node."""

SKEW_SECONDS = 30.0
"""Largest difference between two clocks. Times in logs then mean something, and signed requests are taken."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PACKAGES = ("ray-dfml", "ray", "torch", "numpy")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. What is neither ok nor fatal is a warning."""

    check: str
    ok: bool
    text: str
    fatal: bool = True


def examine(storage: Path | Uri | None = None) -> list[Finding]:
    """Check the cluster that this process is connected to: nodes, versions, clocks, transfers, storage, token.

    `storage` is a folder, also one of an object store, that all nodes should see. A line may stand for many nodes.
    """
    nodes = {node["NodeID"]: f"node {node['NodeManagerAddress']}" for node in ray.nodes() if node["Alive"]}
    before = time.time()
    answers, silent = _each(nodes, dict.fromkeys(nodes, (_say,)))
    after = time.time()
    names = {id: f"{nodes[id]} ({answers[id]['host']})" for id in answers}
    found = [_whole("nodes", [*silent.values()], f"{len(answers)} of {len(nodes)} answer")]
    here = versions()
    unlike = differences(here, {names[id]: one["versions"] for id, one in answers.items()})
    found.append(_whole("versions", unlike, " ".join(f"{name} {version}" for name, version in here.items())))
    clocks = skews(before, after, {names[id]: one["time"] for id, one in answers.items()})
    found.append(_whole("clocks", clocks, f"within {SKEW_SECONDS:g} s"))
    found.append(_whole("transfers", _transfers(names), "every node fetches an object from another"))
    if storage is not None:
        found.append(_whole("storage", _storage(names, storage), f"{storage}: what one node writes, the others read"))
    return [*found, dashboard(_dashboard_url())]


def require() -> list[Finding]:
    """Examine the cluster before a run. Returns the warnings. Raises ResourceError, in one line, if it is not fit."""
    found = examine()
    bad = [one.text for one in found if not one.ok and one.fatal]
    if bad:
        raise ResourceError(f"the cluster is not fit for a run: {'; '.join(bad)} (see ray-dfml check)")
    return [one for one in found if not one.ok]


def announce() -> None:
    """Examine the cluster of RAY_ADDRESS before work, with the warnings on the terminal. Raises as `require`."""
    for warning in require():
        print(f"warning: {warning.text}", file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    """What is installed here that must be equal on all nodes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def differences(here: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each node whose versions differ from those of this process."""
    lines = []
    for node, there in nodes.items():
        other = [f"{name} {there.get(name)} instead of {here[name]}" for name in here if there.get(name) != here[name]]
        if other:
            lines.append(f"{node} has {', '.join(other)}; use one image for all nodes")
    return lines


def skews(before: float, after: float, nodes: Mapping[str, float]) -> list[str]:
    """A line for each node whose clock is wrong: it must show a time between `before` and `after`, in seconds."""
    off = {node: max(before - shown, shown - after) for node, shown in nodes.items()}
    return [f"{node}: its clock is {s:.0f} s off; synchronise it" for node, s in off.items() if s > SKEW_SECONDS]


def dashboard(url: str) -> Finding:
    """Whether a dashboard, at HOST:PORT, is reached from here, and refuses who has no token."""
    if not url:
        return Finding("token", True, "no dashboard, so nobody can submit jobs")
    try:
        code = _ask(url)
    except OSError as error:
        reason = getattr(error, "reason", error)
        return Finding("token", False, f"the dashboard at {url} cannot be reached from here: {reason}; open its port")
    if code in (401, 403):
        return Finding("token", True, f"the dashboard at {url} refuses who has no token")
    host, _, port = url.rpartition(":")
    if host.strip("[]") in LOOPBACK and not _listens(int(port)):
        return Finding("token", True, f"the dashboard at {url} asks for no token, and listens at its own machine alone")
    return Finding(
        "token", False, f"the dashboard at {url} asks for no token and listens beyond its own machine: whoever reaches "
        "it can run code on the cluster; start the cluster with RAY_AUTH_MODE=token", fatal=False,
    )  # fmt: skip


def _ask(url: str) -> int:
    """The status of the list of jobs for somebody without a token. Raises OSError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{url}/api/jobs/", timeout=NODE_SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def _listens(port: int) -> bool:
    """Whether this machine also takes connections to a port at an address that other machines can reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; it tells the address that others see
            socket.create_connection((probe.getsockname()[0], port), timeout=2).close()
        except OSError:
            return False
    return True


def _dashboard_url() -> str:
    with keeping_sigterm():
        return ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url or ""


def _whole(check: str, bad: Sequence[str], good: str) -> Finding:
    return Finding(check, not bad, "; ".join(bad) or good)


def _on(node: str, function: Callable[..., Any], *args: Any) -> Any:
    """Start a call of a function on a node, which need not be idle."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    return task.options(scheduling_strategy=OnNode(node, soft=False)).remote(*args)


def _each(names: Mapping[str, str], calls: Mapping[str, tuple[Any, ...]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Call a function, with its arguments, on each of some nodes.

    Returns the answers, and a line for each failure, by the ids of the nodes: nodes of one machine share a name.
    """
    refs = {id: _on(id, function, *args) for id, (function, *args) in calls.items()}
    answers, bad, until = {}, {}, time.monotonic() + NODE_SECONDS
    for id, ref in refs.items():
        try:
            answers[id] = ray.get(ref, timeout=max(until - time.monotonic(), 0.1))
        except exceptions.GetTimeoutError:
            bad[id] = f"{names[id]} does not answer within {NODE_SECONDS:g} s; look at its log and its ports"
        except exceptions.RayTaskError as error:
            bad[id] = f"{names[id]}: {str(error).strip().splitlines()[-1]}"
        except exceptions.RayError as error:  # Ray goes on with advice
            bad[id] = f"{names[id]}: {(str(error).strip() or type(error).__name__).splitlines()[0].partition('. ')[0]}"
    return answers, bad


def _transfers(names: Mapping[str, str]) -> list[str]:
    """Let each node fetch an object that the one before it has made."""
    if len(names) < 2:
        return []
    ids = list(names)
    made = {id: _on(id, _make) for id in ids}
    before = dict(zip(ids, [ids[-1], *ids[:-1]], strict=True))
    _, bad = _each(names, {id: (_take, made[before[id]]) for id in ids})
    return [f"fetching from {names[before[id]]}: {line}" for id, line in bad.items()]


def _storage(names: Mapping[str, str], folder: Path | Uri) -> list[str]:
    """Let one node write a file, and all nodes read it."""
    if not names:
        return []
    text, path = uuid.uuid4().hex, folder / f".check-{uuid.uuid4().hex}"
    first = next(iter(names))
    _, bad = _each(names, {first: (_write, path, text)})
    if bad:
        return [*bad.values()]
    try:
        answers, bad = _each(names, dict.fromkeys(names, (_read, path)))
    finally:
        _each(names, {first: (_remove, path)})
    others = [f"{names[id]} reads another file at {path}" for id, said in answers.items() if said != text]
    return [*bad.values(), *others]


def _say() -> dict[str, Any]:
    return {"host": socket.gethostname(), "versions": versions(), "time": time.time()}


def _make() -> np.ndarray:
    return np.ones(2**18)  # too large to travel in the message itself


def _take(values: np.ndarray) -> float:
    return float(values.sum())


def _write(path: Path | Uri, text: str) -> None:
    object_store.write(path, text.encode()) if isinstance(path, Uri) else path.write_text(text)


def _read(path: Path | Uri) -> str:
    return object_store.read(path).decode() if isinstance(path, Uri) else path.read_text()


def _remove(path: Path | Uri) -> None:
    object_store.remove(path) if isinstance(path, Uri) else path.unlink(missing_ok=True)
