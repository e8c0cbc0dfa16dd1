"""What is left to spend. Sums of money are decimal, so that 3 images at 0.1 cost 0.3 and not a little more."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from ray_dfml.data.services import Asked, Budget
from ray_dfml.errors import BudgetReached


def exact(number: float) -> Decimal:
    """The decimal number that a float is written as."""
    return Decimal(repr(float(number)))


@dataclass
class Used:
    """What was sent so far, and its price."""

    sent: int = 0
    cost: Decimal = field(default_factory=Decimal)

    def add(self, sent: int, price: Decimal) -> None:
        """Count images that were sent; a negative number gives some back."""
        self.sent += sent
        self.cost += sent * price


class Budgets:
    """The budgets of teachers, of pools and of the run, and what was used of each."""

    def __init__(
        self, asked: Iterable[Asked], *, run: Budget, each: Budget, pools: Mapping[str, Budget]
    ) -> None:  # fmt: skip
        """`each` bounds every teacher, beside what its own terms say."""
        self._asked = {one.card.id: one for one in asked}
        self._run, self._each, self._pools = run, each, pools
        self._teachers: dict[str, Used] = defaultdict(Used)

    def count(self, teacher: str, sent: int, price: Decimal) -> None:
        """Count images that were sent to a teacher, or give some back."""
        self._teachers[teacher].add(sent, price)

    def used(self, teacher: str) -> Used:
        """What was used of a teacher."""
        return self._teachers[teacher]

    def _all(self, pool: str | None = None) -> Used:
        of_pool = [
            used for id, used in self._teachers.items()
            if pool is None or (id in self._asked and self._asked[id].pool == pool)
        ]  # fmt: skip
        return Used(sum(used.sent for used in of_pool), sum((used.cost for used in of_pool), Decimal()))

    def check(self, teacher: str, images: int) -> None:
        """Raise BudgetReached, which names the budget, what is used of it and what is asked, unless all allow it."""
        one = self._asked[teacher]
        price = exact(one.terms.price)
        own, used = Budget(queries=one.terms.budget, money=one.terms.money), self._teachers[teacher]
        _afford(f"the budget of teacher {teacher}", own, used, images, price)
        _afford(f"the run's budget for each teacher, here {teacher},", self._each, used, images, price)
        if one.pool in self._pools:
            _afford(f"the budget of pool {one.pool}", self._pools[one.pool], self._all(one.pool), images, price)
        _afford("the budget of the run", self._run, self._all(), images, price)


def _afford(name: str, budget: Budget, used: Used, images: int, price: Decimal) -> None:
    if budget.queries is not None and used.sent + images > budget.queries:
        raise BudgetReached(
            f"{name} is {budget.queries} images: {used.sent} are sent and {images} more are asked; "
            "all answers so far are kept"
        )
    if budget.money is not None and used.cost + images * price > exact(budget.money):
        raise BudgetReached(
            f"{name} is {budget.money:g} in money: {used.cost:f} is spent and {images * price:f} more is asked; "
            "all answers so far are kept"
        )
