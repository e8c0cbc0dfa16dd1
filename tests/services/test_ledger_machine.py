"""The laws of the ledger under any order of calls, against a model of it in plain Python."""

from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ray_dfml.errors import BudgetReached
from ray_dfml.services.ledger import Ledger
from tests.services.test_ledger import ONE, asked, hashes, rows
from tests.support import PROPERTY


class LedgerMachine(RuleBasedStateMachine):
    """A ledger, and a model of it in plain Python, under any order of calls with restarts in between."""

    folder: Path
    budget, price = 40, Decimal("0.1")

    @initialize()
    def begin(self) -> None:
        self.path = LedgerMachine.folder / f"{id(self)}.sqlite"
        self.path.unlink(missing_ok=True)
        self.sent, self.known = 0, set()
        self.open_batches: dict[int, tuple[list[int], int]] = {}
        self.start()

    def start(self) -> None:
        self.ledger = Ledger(self.path, [asked(price=float(self.price), money=float(self.price * self.budget))])

    def fits(self, n: int) -> bool:
        return self.sent + n <= self.budget

    @rule(numbers=st.lists(st.integers(0, 30), min_size=1, max_size=6))
    def claim(self, numbers: list[int]) -> None:
        new = [n for n in dict.fromkeys(numbers) if n not in self.known]
        if not self.fits(len(new)):
            with pytest.raises(BudgetReached):
                self.ledger.claim(ONE, hashes(*numbers))
            return
        claim = self.ledger.claim(ONE, hashes(*numbers))
        assert [numbers[i] for i in claim.missing] == new
        assert np.array_equal(claim.join(rows(*new) if new else None), rows(*numbers))
        if new:
            self.open_batches[claim.id] = (new, 1)
            self.sent += len(new)

    @precondition(lambda self: self.open_batches)
    @rule(data=st.data())
    def resend(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.open_batches)))
        numbers, attempts = self.open_batches[id]
        if not self.fits(len(numbers)):
            with pytest.raises(BudgetReached):
                self.ledger.resend(id)
            return
        self.ledger.resend(id)
        self.open_batches[id] = (numbers, attempts + 1)
        self.sent += len(numbers)

    @precondition(lambda self: self.open_batches)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.open_batches)))
        numbers, attempts = self.open_batches[id]
        if attempts == 0:
            with pytest.raises(ValueError, match="no attempt"):
                self.ledger.refund(id)
            return
        self.ledger.refund(id)
        self.open_batches[id] = (numbers, attempts - 1)
        self.sent -= len(numbers)

    @precondition(lambda self: self.open_batches)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.open_batches)))
        numbers, attempts = self.open_batches[id]
        if attempts == 0:
            with pytest.raises(ValueError, match="taken back"):
                self.ledger.settle(id, rows(*numbers))
            return
        self.ledger.settle(id, rows(*numbers))
        del self.open_batches[id]
        self.known |= set(numbers)

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.start()

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "ledger"):
            return
        spent = self.ledger.totals()[ONE]
        assert (spent.sent, spent.answered) == (self.sent, len(self.known))
        assert spent.answered <= spent.sent <= self.budget
        assert spent.cost == float(self.sent * self.price)
        if self.known:
            known = sorted(self.known)
            assert np.array_equal(self.ledger.answers(hashes(*known)), rows(*known))

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()


def test_the_laws_hold_under_any_order_of_calls(tmp_path: Path) -> None:
    LedgerMachine.folder = tmp_path
    run_state_machine_as_test(LedgerMachine, settings=settings(PROPERTY, max_examples=15, stateful_step_count=20))
