"""The laws of the ledger: what was sent is never forgotten, no answer is lost, and no budget is passed."""

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_dfml.data.services import Asked, Budget, Terms
from ray_dfml.errors import BudgetReached, RejectedError, ResourceError
from ray_dfml.services import ledger as module
from ray_dfml.services.ledger import Ledger, content_hashes
from tests.support import card


def asked(i: int = 0, pool: str = "", **terms: Any) -> Asked:
    return Asked(card=card(i), terms=Terms(**terms), pool=pool)


ONE = "conv4-0"


def hashes(*numbers: int) -> list[bytes]:
    return [bytes([number % 256, number // 256]) * 16 for number in numbers]


def rows(*numbers: int) -> np.ndarray:
    """The answers that the images of these numbers have."""
    return np.array([[number, -number] for number in numbers], np.float32)


def test_a_batch_is_granted_settled_and_known(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked()])
    id = ledger.grant(ONE, hashes(1, 2))
    assert ledger.missing(hashes(1, 2)).tolist() == [0, 1]
    ledger.settle(id, rows(1, 2))
    assert ledger.missing(hashes(2, 3, 3, 1)).tolist() == [1]
    assert np.array_equal(ledger.answers(hashes(2, 1, 2)), rows(2, 1, 2))
    assert (ledger.totals()[ONE].sent, ledger.totals()[ONE].answered) == (2, 2)


def test_labels_stay_labels_and_probabilities_keep_their_bits(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked(0), asked(1)])
    ledger.settle(ledger.grant(ONE, hashes(1)), np.array([3]))
    odd = np.array([[0.1, 1e-40], [np.float32(1) / 3, 1.0]], np.float32)
    ledger.settle(ledger.grant("conv4-1", hashes(2, 3)), odd)
    ledger.close()
    again = Ledger(tmp_path / "l.sqlite", [asked(0)])
    assert again.answers(hashes(1)).dtype == np.int64
    assert again.answers(hashes(3, 2)).tobytes() == odd[::-1].tobytes()
    assert again.totals()["conv4-1"].sent == 2  # a teacher that is asked no more still counts


def test_a_claim_names_each_missing_image_once_and_joins_the_answers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked()])
    ledger.settle(ledger.grant(ONE, hashes(1, 2)), rows(1, 2))
    claim = ledger.claim(ONE, hashes(5, 2, 7, 5, 1, 2))
    assert claim.missing.tolist() == [0, 2]
    ledger.settle(claim.id, rows(5, 7))
    assert np.array_equal(claim.join(rows(5, 7)), rows(5, 2, 7, 5, 1, 2))
    full = ledger.claim(ONE, hashes(7, 1))
    assert (full.id, len(full.missing)) == (0, 0)
    assert np.array_equal(full.join(), rows(7, 1))
    assert ledger.totals()[ONE].sent == 4


def test_a_killed_writer_leaves_its_batch_open_and_its_answers_come_late(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked()])
    id = ledger.grant(ONE, hashes(1, 2))
    ledger.close()
    again = Ledger(tmp_path / "l.sqlite", [asked()])
    assert (again.totals()[ONE].sent, again.totals()[ONE].answered) == (2, 0)
    again.settle(id, rows(1, 2))
    again.settle(id, rows(8, 9))  # a repeated call changes nothing
    assert np.array_equal(again.answers(hashes(1, 2)), rows(1, 2))


def test_two_claims_of_one_image_count_twice_as_sent_and_once_as_answered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked()])
    first, second = ledger.claim(ONE, hashes(1)), ledger.claim(ONE, hashes(1))
    ledger.settle(second.id, rows(1))
    ledger.settle(first.id, rows(1))
    assert (ledger.totals()[ONE].sent, ledger.totals()[ONE].answered) == (2, 1)


@pytest.mark.parametrize(
    ("terms", "limits", "says"),
    [
        ({"budget": 5}, {}, "the budget of teacher conv4-0 is 5 images: 4 are sent and 2 more are asked"),
        ({}, {"each": Budget(queries=5)}, "the run's budget for each teacher, here conv4-0, is 5 images: 4 are sent"),
        ({}, {"pools": {"p": Budget(queries=6)}}, "the budget of pool p is 6 images: 5 are sent and 2 more are asked"),
        ({}, {"run": Budget(queries=7)}, "the budget of the run is 7 images: 6 are sent and 2 more are asked"),
        ({"price": 0.1, "money": 0.5}, {}, "the budget of teacher conv4-0 is 0.5 in money: 0.4 is spent and 0.2 more"),
        ({"price": 0.1}, {"run": Budget(money=0.5)}, "the budget of the run is 0.5 in money: 0.4 is spent"),
    ],
)
def test_a_budget_stops_before_the_grant_and_says_which(
    tmp_path: Path, terms: dict[str, Any], limits: dict[str, Any], says: str
) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked(0, "p", **terms), asked(1, "p"), asked(2, "q")], **limits)
    ledger.grant("conv4-1", hashes(10))
    ledger.grant("conv4-2", hashes(11))
    ledger.grant(ONE, hashes(1, 2))
    ledger.grant(ONE, hashes(3, 4))
    before = ledger.totals()
    for act in (lambda: ledger.grant(ONE, hashes(5, 6)), lambda: ledger.claim(ONE, hashes(5, 6))):
        with pytest.raises(BudgetReached) as caught:
            act()
        assert str(caught.value).startswith(says)
    assert ledger.totals() == before


def test_money_is_decimal_and_a_budget_is_spent_to_its_last_image(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked(price=0.1, money=0.3)])
    for number in range(3):
        ledger.grant(ONE, hashes(number))
    assert ledger.totals()[ONE].cost == 0.3
    with pytest.raises(BudgetReached, match=r"0\.3 is spent and 0\.1 more"):
        ledger.grant(ONE, hashes(9))


def test_a_repeat_counts_again_and_what_never_arrived_is_taken_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked(budget=4)])
    id = ledger.grant(ONE, hashes(1, 2))
    ledger.refund(id)
    assert ledger.totals()[ONE].sent == 0
    with pytest.raises(ValueError, match="no attempt"):
        ledger.refund(id)
    ledger.resend(id)
    ledger.resend(id)
    with pytest.raises(BudgetReached, match="4 are sent and 2 more"):
        ledger.resend(id)
    ledger.close()
    assert Ledger(tmp_path / "l.sqlite", [asked()]).totals()[ONE].sent == 4


@pytest.mark.parametrize(
    "answers",
    [rows(1), rows(1, 2).astype(np.float64), np.array([1.0, 2.0], np.float32), np.array([[1], [2]])],
)
def test_answers_of_another_shape_or_type_are_a_defect(tmp_path: Path, answers: np.ndarray) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked()])
    id = ledger.grant(ONE, hashes(1, 2))
    with pytest.raises(ValueError, match="expected 2 answers"):
        ledger.settle(id, answers)
    assert ledger.totals()[ONE].answered == 0


def test_the_export_has_a_line_for_each_batch_whose_sums_are_the_totals(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked(price=0.25), asked(1)])
    ledger.settle(ledger.grant(ONE, hashes(1, 2)), rows(1, 2))
    id = ledger.grant(ONE, hashes(3))
    ledger.resend(id)
    ledger.refund(ledger.grant(ONE, hashes(4)))
    ledger.settle(ledger.grant("conv4-1", hashes(5)), rows(5))
    ledger.export(tmp_path / "ledger.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    plain = [{key: value for key, value in line.items() if key != "time"} for line in lines]
    assert plain == [
        {"teacher": "conv4-0", "access": "weights", "sent": 2, "answered": 2, "cost": 0.5},
        {"teacher": "conv4-0", "access": "weights", "sent": 2, "answered": 0, "cost": 0.5},
        {"teacher": "conv4-1", "access": "weights", "sent": 1, "answered": 1, "cost": 0.0},
    ]
    assert all(line["time"].endswith("+00:00") for line in lines)


def test_there_is_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    ledger = Ledger(tmp_path / "l.sqlite", [asked()])
    with pytest.raises(ResourceError, match="another process has this ledger open"):
        Ledger(tmp_path / "l.sqlite", [asked()])
    ledger.close()
    Ledger(tmp_path / "l.sqlite", [asked()]).close()


def test_the_file_is_synced_at_every_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked()])
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def filled(path: Path) -> Path:
    ledger = Ledger(path, [asked()])
    for first in range(0, 200, 20):
        numbers = range(first, first + 20)
        ledger.settle(ledger.grant(ONE, hashes(*numbers)), rows(*numbers))
    ledger.close()
    return path


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to hold a header of one" * 9, b"SQLite format 3\0"]
)
def test_another_file_is_refused_with_one_line_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(content)
    with pytest.raises(RejectedError) as caught:
        Ledger(path, [asked()])
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_another_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    content = path.read_bytes()
    with pytest.raises(RejectedError, match="is no ledger of this version"):
        Ledger(path, [asked()])
    assert path.read_bytes() == content


@pytest.mark.parametrize("seed", range(20))
def test_a_changed_byte_of_a_batch_is_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    path = filled(tmp_path / "l.sqlite")
    data = bytearray(path.read_bytes())
    place = int(np.random.default_rng(seed).integers(100, len(data)))
    data[place] ^= 0x41
    path.write_bytes(data)
    try:
        ledger = Ledger(path, [asked()])
    except (RejectedError, ResourceError):
        return
    assert np.array_equal(ledger.answers(hashes(*range(200))), rows(*range(200)))
    assert ledger.totals()[ONE].sent == 200


def test_a_shortened_file_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "l.sqlite")
    path.write_bytes(path.read_bytes()[: 4096 * 3])
    with pytest.raises((RejectedError, ResourceError), match=r"l\.sqlite: "):
        Ledger(path, [asked()])


def test_a_full_disk_is_one_line_and_nothing_is_counted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked()])
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ResourceError, match=r"l\.sqlite: the ledger cannot be read or written: .*full"):
        ledger.grant(ONE, hashes(*range(2000)))
    assert ledger.totals()[ONE].sent == 0


def test_several_things_share_a_sync_and_fail_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked(budget=3)])
    said: list[str] = []
    first = ledger.grant(ONE, hashes(1))
    ledger._db.set_trace_callback(said.append)
    acts = [
        lambda: ledger.settle(first, rows(1)), lambda: ledger.grant(ONE, hashes(2)),
        lambda: ledger.grant(ONE, hashes(3, 4)), lambda: ledger.settle(99, rows(1)), lambda: ledger.resend(2),
    ]  # fmt: skip
    results = ledger.together(acts)
    assert [text for text in said if text in ("BEGIN IMMEDIATE", "COMMIT")] == ["BEGIN IMMEDIATE", "COMMIT"]
    assert results[:2] == [None, 2]
    assert [type(result) for result in results[2:]] == [BudgetReached, ValueError, type(None)]
    ledger.close()
    again = Ledger(tmp_path / "l.sqlite", [asked()])
    assert (again.totals()[ONE].sent, again.totals()[ONE].answered) == (3, 1)


def test_a_disk_that_fails_between_several_things_keeps_none_of_them(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked()])
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    acts = [lambda: ledger.grant(ONE, hashes(1)), lambda: ledger.grant(ONE, hashes(*range(2000)))]
    with pytest.raises(ResourceError, match="full"):
        ledger.together(acts)
    with pytest.raises(ResourceError, match="the ledger is closed, since the disk failed"):
        ledger.grant(ONE, hashes(1))
    ledger.close()
    again = Ledger(tmp_path / "l.sqlite", [asked()])
    assert again.totals()[ONE].sent == 0


def test_threads_share_a_ledger_and_never_pass_the_budget(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", [asked(budget=50)])
    stopped = []

    def work(first: int) -> None:
        try:
            for number in range(first, first + 20):
                ledger.settle(ledger.grant(ONE, hashes(number)), rows(number))
        except BudgetReached:
            stopped.append(first)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 80, 20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (ledger.totals()[ONE].sent, ledger.totals()[ONE].answered) == (50, 50)
    assert stopped


def test_a_hash_tells_apart_all_that_an_answer_depends_on() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), np.uint8)
    base, other = content_hashes(asked(), images)
    assert base != other
    assert content_hashes(asked(), images[:1]) == [base]
    assert content_hashes(asked(), images[:, :, ::-1][:, :, ::-1]) == [base, other]
    different = [
        content_hashes(asked(), images.astype(np.float32))[0],
        content_hashes(asked(), images.reshape(2, 3, 8, 32))[0],
        content_hashes(asked(1), images)[0],
        content_hashes(asked(decimals=2), images)[0],
    ]
    assert len({base, *different}) == 5
    assert content_hashes(asked(price=0.5, budget=7), images) == [base, other]
