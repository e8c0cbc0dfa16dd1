"""A probe asks one image, finds out what the entry leaves open, and refuses what does not fit, in one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_dfml.data.pool import Pool
from ray_dfml.data.services import Asked, Terms
from ray_dfml.errors import BudgetReached, RejectedError, ResourceError, UsageError
from ray_dfml.services import ledger, members
from ray_dfml.services.ledger import Ledger
from ray_dfml.services.probe import Probed
from ray_dfml.services.probe import probe as probed
from tests.services.faulty import FaultyService, served, service


@pytest.fixture
def server() -> FaultyService:
    return FaultyService()


@pytest.fixture
def url(server: FaultyService) -> Iterator[str]:
    with served(server) as address:
        yield address


@pytest.mark.parametrize("binary", [True, False])
def test_a_probe_fills_in_what_the_server_says(tmp_path: Path, server: FaultyService, url: str, binary: bool) -> None:
    server.binary = binary
    found = probed(service(url, terms=Terms(price=0.5)), tmp_path / "l.sqlite")
    assert (found.api.input, found.api.datatype, found.api.binary) == ("pixels", "FP32", "on" if binary else "off")
    assert found.spent.sent == server.received == (1 if binary else 2)
    assert found.spent.cost == 0.5 * server.received
    assert found.answer.shape == (3,)
    assert found.notes == []
    again = probed(service(url, **found.api.model_dump(exclude={"url", "adapter", "model", "output", "batch"})),
                   tmp_path / "l.sqlite")  # fmt: skip
    assert again.spent.sent == 1  # a new image, in the way that was found


def test_a_server_that_describes_nothing_is_noted(tmp_path: Path, server: FaultyService, url: str) -> None:
    server.description = {"name": "m", "inputs": [], "outputs": []}
    assert probed(service(url), tmp_path / "l.sqlite").notes == ["the server names no input; 'input' is used"]


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        (["classes"], "svc: answers shape 1x4, expected 1x3: 1 images and 3 classes"),
        (["nan"], "svc: answers NaN or infinite numbers"),
        (["sums"], "svc: answers probabilities that sum to 0.9; rounded ones need decimals, cut ones top_k"),
        (["shape"], "svc: answers shape 0x3"),
        (["401"], "asks for a key (401); name its variable as key_env"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(
    tmp_path: Path, server: FaultyService, url: str, faults: list[str], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = iter(faults)
    with pytest.raises(RejectedError) as caught:
        probed(service(url), tmp_path / "l.sqlite")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.received == 1
    assert caplog.text == ""  # the error is all that is said


def test_what_is_wrong_with_the_entry_sends_nothing(
    tmp_path: Path, server: FaultyService, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    cases: list[tuple[type[Exception], dict[str, Any], str]] = [
        (RejectedError, {"output": "scores"}, "the server has no output 'scores'; it has answer, other"),
        (RejectedError, {"input": "x"}, "the model has no input 'x'; it has pixels"),
        (RejectedError, {"layout": "nhwc"}, "the model takes images of shape [-1, 1, 4, 4], the entry says 4x4x1"),
        (UsageError, {"key_env": "NO_KEY"}, "the environment variable NO_KEY is not set"),
        (UsageError, {"mean": [0.1, 0.2], "std": [1.0, 1.0]}, "api.mean has 2 values, the images 1 channels"),
    ]
    for kind, options, says in cases:
        with pytest.raises(kind) as caught:
            probed(service(url, **options), tmp_path / "l.sqlite")
        assert says in str(caught.value)
    assert server.received == 0


def test_a_spent_budget_and_a_server_that_is_not_there(tmp_path: Path, url: str) -> None:
    once = service(url, terms=Terms(budget=1))
    probed(once, tmp_path / "l.sqlite")
    with pytest.raises(BudgetReached, match="the budget of teacher svc is 1 images: 1 are sent and 1 more"):
        probed(once, tmp_path / "l.sqlite")
    with pytest.raises(RejectedError, match=r"svc: 127\.0\.0\.1:9 cannot be reached: Connection refused"):
        probed(service("http://127.0.0.1:9"), tmp_path / "l.sqlite")


def test_a_ledger_that_another_process_has_open_is_waited_for_once(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands add a service to the same new pool."""
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.1)
    forgotten: list[Path] = []
    monkeypatch.setattr(members, "_forget", lambda path, asked: forgotten.append(path))
    held: list[Ledger] = []

    def late(asked: Asked, path: Path) -> Probed:
        held.append(Ledger(path, []))
        return probed(asked, path)

    monkeypatch.setattr(members, "probe", late)
    api = {"url": url, "adapter": "oip", "model": "m", "output": "answer"}
    with pytest.raises(ResourceError, match="another process has this ledger open"):
        members.add_service(
            Pool.at(tmp_path / "pool"), api, access="probs", input="1x4x4", classes=("a", "b", "c"),
            authorization="J. Doe", terms={},
        )  # fmt: skip
    held[0].close()
    assert forgotten == []


def test_noise_of_a_probe_is_never_the_same(tmp_path: Path, server: FaultyService, url: str) -> None:
    for _ in range(3):
        probed(service(url), tmp_path / "l.sqlite")
    assert server.received == 3
    assert len(np.unique(server.numbers)) > 1


def test_the_connection_on_which_bytes_were_tried_is_not_used_again(
    tmp_path: Path, server: FaultyService, url: str
) -> None:
    """MLServer closes it after a 500 and does not say so; the next request would be lost."""
    server.binary = False
    probed(service(url), tmp_path / "l.sqlite")
    first, second = server.callers
    assert first != second
