"""Shared by all tests: an environment of our own, a toy world, and one Ray for the whole session."""

import os
import secrets

# before anything imports ray, which reads these once
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray listens on every interface, whatever address it is given
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ.pop("RAY_ADDRESS", None)

import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ray_dfml.files import Uri
from ray_dfml.runtime.shard import pin
from tests import stores
from tests.runtime import toy
from tests.support import GPU


def pytest_configure(config: pytest.Config) -> None:
    """Hide the accelerator from the tests of the CPU, since a shard would choose it."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def array_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images are cached in a temporary folder, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_DFML_CACHE", str(tmp_path_factory.mktemp("arrays")))
        yield


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the code under test does its work. `pytest -m gpu` runs the tests that take it on an accelerator.

    On an accelerator products have full precision, as in a shard, and convolutions add up in a fixed order.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "cpu":
            pin()
            patch.setattr(torch.backends.cudnn, "deterministic", True)
        yield torch.device(request.param)


@pytest.fixture
def memory_folder() -> Uri:
    """An empty folder of an object store in the memory of this process."""
    return Uri(f"memory://{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """Where a server of S3 on this machine is found."""
    with stores.s3_server() as environment:
        yield environment


@pytest.fixture
def s3_folder(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Uri:
    """An empty folder of that server."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return Uri(f"s3://bucket/{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Spec of 12 + 6 + 8 classes of 20 separable 16x16 grey images, split by class."""
    root = tmp_path_factory.mktemp("images")
    toy.write_images(root)
    return f"folder:{root}"


@pytest.fixture(scope="session")
def other_data(tmp_path_factory: pytest.TempPathFactory, toy_data: str) -> str:
    """Spec of the toy images with one of them rotated: other data under the same name."""
    root = Path(shutil.copytree(toy_data.partition(":")[2], tmp_path_factory.mktemp("other") / "images"))
    file = root / "test" / "test00" / "00.png"
    Image.open(file).rotate(90).save(file)
    return f"folder:{root}"


@pytest.fixture(scope="session")
def toy_pool(tmp_path_factory: pytest.TempPathFactory, toy_data: str) -> Path:
    """Four 2-way Conv4 teachers of the toy images."""
    return toy.build_pool(tmp_path_factory.mktemp("pools") / "toy", toy_data, models=4, way=2)


@pytest.fixture(scope="session")
def free_run(tmp_path_factory: pytest.TempPathFactory, toy_pool: Path, toy_data: str) -> Path:
    """A finished FREE run of one process, to which every other way to run it is compared. It must not be changed."""
    path = tmp_path_factory.mktemp("runs") / "free"
    toy.train(toy.config("free", toy_pool, toy_data), path)
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One Ray with two logical CPUs and a dashboard for the session, to which a test may add nodes.

    Its ports are free ones, also those that Ray would share with another one on this machine. Only what is started here
    is stopped.
    """
    import ray
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 2, "object_store_memory": 200 * 2**20, "include_dashboard": True,
        "dashboard_agent_listen_port": None,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., toy.Done]:
    """command(*words) -> exit code, stdout and stderr of `ray-dfml words`, in this process."""
    from ray_dfml.cli import main

    def run(*words: object) -> toy.Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        text = capsys.readouterr()
        return toy.Done(int(stopped.value.code or 0), text.out, text.err)

    return run
