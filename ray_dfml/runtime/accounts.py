"""Whom a run asks, what it may spend, and what it has spent. The ledger lies in the run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_dfml.data.services import Asked, Budget
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.services.budgets import exact
from ray_dfml.services.gateway import Gateway
from ray_dfml.services.keys import missing_keys
from ray_dfml.services.ledger import Ledger
from ray_dfml.types import Spent

LEDGER = "ledger.sqlite"
"""The ledger's file in a run folder."""
EXPORTED = "ledger.jsonl"
"""What people read of it."""

NO_BUDGET = Budget()


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """The teachers that a run asks, and the budgets of the run, of every teacher, and of pools by path."""

    asked: Sequence[Asked] = ()
    run: Budget = NO_BUDGET
    each: Budget = NO_BUDGET
    pools: Mapping[str, Budget] = field(default_factory=dict)
    planned: Mapping[str, int] = field(default_factory=dict)
    """Teacher id -> the images that a whole training asks it about."""

    @property
    def by_id(self) -> dict[str, Asked]:
        """Teacher id -> the teacher."""
        return {one.card.id: one for one in self.asked}

    def check_keys(self) -> None:
        """Raise UsageError, which names the variable, unless the key of each service of the plan is in this process.

        So no service is paid before another one turns out to have no key.
        """
        if lines := missing_keys(one for one in self.asked if self.planned.get(one.card.id)):
            raise UsageError(lines[0] + (f" ({len(lines) - 1} more services lack theirs)" if lines[1:] else ""))

    def check_budgets(self) -> None:
        """Raise UsageError if a budget is below one request to a service of the plan, in images or in money.

        That of an entry was checked when its pool was read.
        """
        for one in self.asked:
            batch = min(one.api.images, self.planned.get(one.card.id, 0)) if one.api else 0
            pool = self.pools.get(one.pool, NO_BUDGET)
            price = batch * exact(one.terms.price)
            for name, most in (
                ("budget.queries", self.run.queries), ("budget.per_teacher", self.each.queries),
                (f"budget.queries of {one.pool}", pool.queries),
            ):  # fmt: skip
                if most is not None and most < batch:
                    raise UsageError(
                        f"{name}: {most} is below one batch of {batch} images to {one.card.id}; raise it, or lower "
                        "api.batch of its entry"
                    )
            for name, most in (("budget.money", self.run.money), (f"budget.money of {one.pool}", pool.money)):
                if most is not None and exact(most) < price:
                    raise UsageError(
                        f"{name}: {most:g} is below the price of one batch of {batch} images to {one.card.id}, "
                        f"{price:f}; raise it, or lower api.batch of its entry"
                    )

    def check_ledger(self, folder: Path, known: Mapping[str, Any]) -> None:
        """Raise RejectedError if the ledger in `folder` has forgotten queries that the run has noted.

        `known` is what `spending` gave for it. A ledger that was lost would begin each budget anew.
        """
        noted = {id: one["sent"] for id, one in known.get("teachers", {}).items() if one["sent"]}
        if not noted:
            return
        ledger = Ledger(folder / LEDGER, self.asked)
        totals = ledger.totals()
        ledger.close()
        for id, sent in noted.items():
            found = totals[id].sent if id in totals else 0
            if found < sent:
                raise RejectedError(
                    f"{folder / LEDGER}: holds {found} images sent to {id}, and the run has noted {sent}; put back the "
                    "ledger of this run, or start a new one"
                )

    def gateway(self, folder: Path) -> Gateway:
        """The gateway of the run in `folder`, with the ledger that lies there, or a new one."""
        return Gateway(folder / LEDGER, self.asked, run=self.run, each=self.each, pools=self.pools)

    def settled(self, folder: Path) -> dict[str, Spent]:
        """What was spent, after everybody who may ask has stopped. `ledger.jsonl` is written anew."""
        ledger = Ledger(folder / LEDGER, self.asked)
        try:
            ledger.export(folder / EXPORTED)
            return ledger.totals()
        finally:
            ledger.close()


def spending(totals: Mapping[str, Spent]) -> dict[str, Any]:
    """What was spent as files show it: `answered` and `sent` images and `money`, in all and for each teacher."""
    each = {id: {"answered": one.answered, "sent": one.sent, "money": one.cost} for id, one in totals.items()}
    keys = ("answered", "sent", "money")
    return {key: round(sum(one[key] for one in each.values()), 9) for key in keys} | {"teachers": each}
