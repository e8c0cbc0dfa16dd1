"""The command line in one process on an accelerator, which a shard chooses by itself."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ray_dfml.data.pool import Pool
from ray_dfml.methods import METHODS
from ray_dfml.runtime.shard import pick_device
from tests.runtime import toy
from tests.support import GPU

Command = Callable[..., toy.Done]
pytestmark = GPU


@pytest.fixture(autouse=True)
def busy() -> Iterator[None]:
    """A test here has work done on the accelerator."""
    assert pick_device().type != "cpu", "no accelerator; see `nvidia-smi`"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    yield
    assert torch.cuda.max_memory_allocated() > before


def done(command: Command, *words: object) -> str:
    """What a command that succeeds prints."""
    found = command(*words)
    assert found.code == 0, found.err
    return found.out


@pytest.mark.parametrize("gpus_per_learner", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_tested(
    method: str, gpus_per_learner: int, tmp_path: Path, toy_pool: Path, toy_data: str, command: Command
) -> None:
    pool = () if method == "maml-oracle" else ("--pool", toy_pool)
    distils = METHODS[method].students is not None  # and its teachers know no class of the test images
    data = () if distils else ("--data", toy_data)
    words = (*data, "--run-dir", tmp_path / "run", "--backend", "local", *toy.flags(method))
    said = done(command, "train", method, *pool, *words, "--gpus-per-learner", gpus_per_learner, "--json")
    rows = json.loads(said)["scores"]
    if distils:
        assert len(list((tmp_path / "run" / "students").glob("*.safetensors"))) == len(Pool.open(toy_pool).cards)
        return
    assert {row["method"].split("-")[0] for row in rows} == {method.split("-")[0], "random"}
    assert all(0 < row["mean"] <= 100 for row in rows)
    assert toy.status(tmp_path / "run")["state"] == "done"


def test_a_run_is_evaluated_and_adapts(tmp_path: Path, free_run: Path, toy_data: str, command: Command) -> None:
    said = done(command, "evaluate", free_run, "--data", toy_data, "--shot", 1, "--episodes", 20, "--json")
    assert [row["method"] for row in json.loads(said)] == ["free", "random"]
    test = Path(toy_data.partition(":")[2]) / "test"
    for name in ("test00", "test01"):
        shutil.copytree(test / name, tmp_path / "support" / name, ignore=shutil.ignore_patterns("0[5-9].png", "1*.png"))
    said = done(command, "adapt", free_run, "--support", tmp_path / "support", "--query", test / "test01", "--json")
    assert len(json.loads(said)) == 20


@pytest.mark.parametrize("method", ["free", "purer", "bidf-mkd"])
def test_a_dry_run_times_a_method(method: str, tmp_path: Path, toy_pool: Path, command: Command) -> None:
    words = ("--pool", toy_pool, "--run-dir", tmp_path / "run", "--backend", "local", *toy.flags(method))
    plan = json.loads(done(command, "train", method, *words, "--dry-run", "--json"))
    assert plan["training minutes"] is not None
    assert not (tmp_path / "run").exists()


def test_a_pool_is_built(tmp_path: Path, toy_data: str, command: Command) -> None:
    """Of blocks with little noise: a teacher that has learnt them makes hardly a mistake."""
    words = ("--data", toy_data, "--way", 2, "--arch", "conv4,resnet10", "--models", 2, "--workers", 1)
    done(command, "pool", "build", *words, "--set", "pretrain.epochs=8", "--out", tmp_path / "pool", "--json")
    rows = json.loads(done(command, "pool", "check", tmp_path / "pool", "--json"))
    assert [row["ok"] for row in rows] == [True, True]
    assert all((card.accuracy or 0) >= 90 for card in Pool.open(tmp_path / "pool").cards)
