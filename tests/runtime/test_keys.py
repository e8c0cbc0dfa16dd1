"""A run with services looks for their keys, and at its budgets, before it sends anything."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_dfml.errors import UsageError
from ray_dfml.runtime.accounts import Accounts
from ray_dfml.runtime.driver import read_inputs
from ray_dfml.services.ledger import Ledger
from tests.runtime import toy
from tests.runtime.test_accounts import ids, pool_with
from tests.services.faulty import KEY, FaultyService, served, service

Command = Callable[..., toy.Done]
HERE = ("--backend", "local")


@pytest.fixture
def server() -> FaultyService:
    return FaultyService()


@pytest.fixture
def url(server: FaultyService) -> Iterator[str]:
    with served(server) as address:
        yield address


def services(toy_pool: Path, path: Path, url: str, *changes: dict[str, Any]) -> Path:
    """A copy of the toy pool whose first teachers are services, each with changes of its `api`."""
    pool = pool_with(toy_pool, path)
    content = yaml.safe_load((pool / "pool.yaml").read_text())
    for entry, change in zip(content["teachers"], changes, strict=False):
        for name in ("weights", "sha256", "arch", "mean", "std"):
            entry.pop(name, None)
        entry["access"] = "probs"
        entry["api"] = {"url": url, "adapter": "oip", "model": "m", "output": "answer"} | change
    (pool / "pool.yaml").write_text(yaml.safe_dump(content))
    return pool


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_key_that_is_missing_ends_a_run_before_another_service_is_paid(
    tmp_path: Path, toy_pool: Path, server: FaultyService, url: str, command: Command,
    monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setenv("FIRST_KEY", KEY)
    monkeypatch.delenv("SECOND_KEY", raising=False)
    pool, run = services(toy_pool, tmp_path / "pool", url, {"key_env": "FIRST_KEY"}, {"key_env": "SECOND_KEY"}), "run"
    done = command("train", "ideal", "--pool", pool, "--run-dir", tmp_path / run, *HERE, *toy.flags("ideal"), *more)
    wanted = f"{ids(pool)[1]}: the environment variable SECOND_KEY is not set; it must hold the key"
    assert (done.code, done.err) == (2, f"ray-dfml: {wanted}\n")
    assert (server.received, (tmp_path / run).exists()) == (0, False)


def test_the_number_of_missing_keys_is_said(tmp_path: Path, toy_pool: Path, url: str) -> None:
    pool = services(toy_pool, tmp_path / "pool", url, *[{"key_env": f"NO_SUCH_{n}"} for n in range(4)])
    with pytest.raises(UsageError, match=r"NO_SUCH_0 is not set; .* \(3 more services lack theirs\)"):
        read_inputs(toy.config("ideal", pool, None))


def test_a_service_that_is_not_asked_needs_no_key(tmp_path: Path, toy_pool: Path, url: str) -> None:
    """FREE without surrogates leaves services out."""
    pool = services(toy_pool, tmp_path / "pool", url, {"key_env": "NO_SUCH_KEY"})
    assert [one.card.id for one in read_inputs(toy.config("free", pool, None)).accounts.asked] == ids(pool)[:1]


@pytest.mark.parametrize(("name", "value"), [("queries", 7), ("per_teacher", 3)])
def test_a_budget_below_one_request_is_refused_before_anything_is_sent(
    tmp_path: Path, toy_pool: Path, server: FaultyService, url: str, command: Command, name: str, value: int
) -> None:
    pool, run = services(toy_pool, tmp_path / "pool", url, {"batch": 8}), tmp_path / "run"
    words = ("train", "ideal", "--pool", pool, "--run-dir", run, *HERE, *toy.flags("ideal", f"budget.{name}={value}"))
    done = command(*words)
    wanted = f"budget.{name}: {value} is below one batch of 8 images to {ids(pool)[0]}; raise it, or lower api.batch"
    assert (done.code, done.err) == (2, f"ray-dfml: {wanted} of its entry\n")
    assert (server.received, run.exists()) == (0, False)
    read_inputs(toy.config("ideal", pool, None, f"budget.{name}=8"))


@pytest.mark.parametrize("whole", [False, True], ids=["run", "pool"])
def test_money_below_the_price_of_one_request_is_refused(tmp_path: Path, toy_pool: Path, url: str, whole: bool) -> None:
    pool = services(toy_pool, tmp_path / "pool", url, {"batch": 8})
    content = yaml.safe_load((pool / "pool.yaml").read_text())
    content["teachers"][0]["price"] = 0.1
    content |= {"budget": {"money": 0.79}} if whole else {}
    (pool / "pool.yaml").write_text(yaml.safe_dump(content))
    more = () if whole else ("budget.money=0.79",)
    with pytest.raises(
        UsageError, match=r"budget.money.*: 0.79 is below the price of one batch of 8 images to .*, 0.8"
    ):
        read_inputs(toy.config("ideal", pool, None, *more))
    (pool / "pool.yaml").write_text((pool / "pool.yaml").read_text().replace("0.79", "0.8"))
    read_inputs(toy.config("ideal", pool, None, *(text.replace("0.79", "0.8") for text in more)))


def test_the_gateway_of_a_cluster_looks_for_the_keys_in_its_own_environment(
    tmp_path: Path, toy_pool: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_gateway = pytest.importorskip("ray_dfml.runtime.ray_gateway")
    monkeypatch.setenv("THE_KEY", KEY)
    pool = services(toy_pool, tmp_path / "pool", url, {"key_env": "THE_KEY"})
    accounts = read_inputs(toy.config("ideal", pool, None)).accounts
    monkeypatch.delenv("THE_KEY")
    actor = ray_gateway.GatewayActor(accounts, tmp_path)
    with pytest.raises(UsageError, match=r"^in the environment of the Ray cluster: .* THE_KEY is not set; it must"):
        actor.check_keys()
    actor.call("close")


def test_a_cluster_that_has_no_key_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster was started before the variable was set, so only this process has it."""
    cluster = pytest.importorskip("ray_dfml.runtime.cluster")
    monkeypatch.delenv("THE_KEY", raising=False)
    accounts = Accounts(asked=[service("http://127.0.0.1:9", key_env="THE_KEY")], planned={"svc": 1})
    new = cluster.connect(1, 0.0)
    try:
        monkeypatch.setenv("THE_KEY", KEY)
        accounts.check_keys()
        with pytest.raises(UsageError) as caught:
            cluster.RayGateway.start(accounts, tmp_path, cluster._node())
        said = "svc: the environment variable THE_KEY is not set; it must hold the key"
        assert str(caught.value) == f"in the environment of the Ray cluster: {said}"
        Ledger(tmp_path / "ledger.sqlite", []).close()  # nobody holds it any more
    finally:
        if new:
            cluster.ray.shutdown()
