"""Teachers behind HTTP: a model of the same weights gives the same students, and so do shards, whoever is killed.

A proxy kills when a request passes it, so at the same count on every machine. What was answered is asked once.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from aiohttp import web

from ray_dfml.data.pool import Pool
from ray_dfml.runtime import launch
from ray_dfml.runtime.driver import Machine
from ray_dfml.services.hosting import Gives, from_pool
from tests.runtime import toy
from tests.runtime.test_accounts import ids, pool_with, sums
from tests.runtime.test_bits import PATIENCE
from tests.services.faulty import Recorder, served
from tests.services.serving import counts, running

PLAN, BATCH = 24, 8
"""Images that a whole training asks each teacher about, and how many a round does."""
STRUCK = 7
"""Number of the request at which a process is killed, of about 16."""


class Striking(Recorder):
    """A proxy that does something when the first request with a given number comes, before it passes it on."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.requests, self.at_work = 0, 0
        self.strike: Callable[[], None] | None = None

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """See Recorder."""
        if request.method == "POST":
            self.requests += 1
            if self.requests == STRUCK and self.strike is not None:
                before = self.seen
                self.strike()
                answer = await super().__call__(request)
                self.at_work = self.seen - before
                return answer
        return await super().__call__(request)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, toy_pool: Path) -> Iterator[str]:
    """The toy pool, served as probabilities."""
    pool = Pool.open(toy_pool)
    models = [from_pool(pool, id, Gives(access="probs"), torch.device("cpu")) for id in ids(toy_pool)]
    with running(models, tmp_path_factory.mktemp("served")) as found:
        yield found.url


@pytest.fixture
def proxy(server: str) -> Striking:
    return Striking(server)


@pytest.fixture
def pool(tmp_path: Path, toy_pool: Path, proxy: Striking) -> Iterator[Path]:
    """The toy pool as services, each of which gets one request at a time."""
    path = pool_with(toy_pool, tmp_path / "pool")
    content = yaml.safe_load((path / "pool.yaml").read_text())
    with served(proxy) as url:
        for entry in content["teachers"]:
            for name in ("weights", "sha256", "arch", "mean", "std"):
                entry.pop(name, None)
            api = {"url": url, "adapter": "oip", "model": entry["id"], "output": "probabilities"}
            entry |= {"access": "probs", "api": api | {"batch": BATCH, "concurrency": 1}}
        (path / "pool.yaml").write_text(yaml.safe_dump(content))
        yield path


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory, toy_pool: Path) -> Path:
    """A quiet run in one process on the same weights, closed at the same level."""
    root = tmp_path_factory.mktemp("wrapped")
    toy.train(toy.config("ideal", pool_with(toy_pool, root / "pool", *[{"access": "probs"}] * 4), None), root / "run")
    return root / "run"


def students(run: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((run / "students").rglob("*.safetensors"))]


def assert_same(run: Path, wrapped: Path, toy_pool: Path, twice: int = 0) -> None:
    """The students of the wrapped models, and every image paid once but for those on their way at a kill."""
    assert students(run) == students(wrapped)
    assert len(students(run)) == 4
    toy.assert_equal(toy.last_state(run), toy.last_state(wrapped))
    found = sums(run)
    assert {id: answered for id, (_, answered) in found.items()} == dict.fromkeys(ids(toy_pool), PLAN)
    assert sum(sent for sent, _ in found.values()) == 4 * PLAN + twice
    assert toy.status(run)["rejected"] == {}


def test_a_service_and_a_wrapped_model_make_the_same_student(
    tmp_path: Path, pool: Path, wrapped: Path, toy_pool: Path, proxy: Striking
) -> None:
    toy.train(toy.config("ideal", pool, None), tmp_path / "run")
    assert_same(tmp_path / "run", wrapped, toy_pool)
    assert proxy.seen == 4 * PLAN


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_shards_ask_services_as_one_process_does(
    tmp_path: Path, pool: Path, wrapped: Path, toy_pool: Path, proxy: Striking
) -> None:
    toy.train(toy.config("ideal", pool, None), tmp_path / "run", Machine(workers=2))
    assert_same(tmp_path / "run", wrapped, toy_pool)
    assert proxy.seen == 4 * PLAN


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_gateway_killed_with_a_request_on_its_way(
    tmp_path: Path, pool: Path, wrapped: Path, toy_pool: Path, proxy: Striking, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_dfml.runtime.ray_environment import ray
    from ray_dfml.runtime.ray_gateway import RayGateway

    plain = RayGateway.start

    def start(*args: Any) -> RayGateway:
        made = plain(*args)
        number = ray.get(made._actor.__ray_call__.remote(lambda _: os.getpid()))
        proxy.strike = lambda: os.kill(number, signal.SIGKILL)
        return made

    monkeypatch.setattr(RayGateway, "start", start)
    toy.train(toy.config("ideal", pool, None), tmp_path / "run", Machine(workers=1))
    assert proxy.at_work
    assert_same(tmp_path / "run", wrapped, toy_pool, twice=proxy.at_work)
    assert proxy.seen == 4 * PLAN + proxy.at_work


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_driver_killed_with_a_request_on_its_way(
    tmp_path: Path, pool: Path, wrapped: Path, toy_pool: Path, proxy: Striking, server: str
) -> None:
    """Its actors end with it, so up to what they had on their way is paid twice; nothing that was answered is."""
    from ray_dfml.runtime.ray_environment import ray

    run, before = tmp_path / "run", counts(server)[0]
    words = [sys.executable, "-m", "ray_dfml", "train", "ideal", "--pool", pool, "--run-dir", run, *toy.flags("ideal")]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen([*map(str, words)], env=environment, stderr=subprocess.PIPE, text=True)
    proxy.strike = driver.kill
    _, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == -signal.SIGKILL, said
    launch.continue_run(run, "ideal", Machine(workers=1), quiet=True)
    twice = sum(sent for sent, _ in sums(run).values()) - 4 * PLAN
    assert_same(run, wrapped, toy_pool, twice=twice)
    assert 0 <= twice <= 2 * BATCH
    assert 4 * PLAN <= counts(server)[0] - before <= 4 * PLAN + twice
