"""How fast a client sends: at a rate that is given, and below what a busy service showed that it bears.

A refused batch counts as sent, so it is cheaper to send slowly than to be refused.
"""

import time
from collections import deque
from collections.abc import Callable

WINDOW = 10.0
"""Seconds over which answered images are counted."""
SLOWER, FASTER = 0.7, 1.03
"""Factors of the rate after a refusal, and after each answer that follows."""

LIFTED = 25
"""Answers in a row after which a limit is taken to be gone: twice as many as a true one allows."""


class Pace:
    """Images a second. A batch goes out at once and leaves a debt, which the next one waits for."""

    def __init__(self, rate: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate` is never exceeded. With None there is no bound until the service refuses a batch."""
        self._most, self.rate, self._clock = rate, rate, clock
        self._next = self._quiet_until = 0.0
        self._answered: deque[tuple[float, int]] = deque()
        self._slowed_at = float("-inf")
        self._in_a_row = 0

    def wait(self) -> float:
        """Seconds until the service may be asked again, as it said itself."""
        return max(0.0, self._quiet_until - self._clock())

    def take(self, images: int) -> float:
        """Take the next place in the order of batches, and return the seconds until it comes."""
        now = self._clock()
        start = max(now, self._next)
        self._next = start + images / self.rate if self.rate else start
        return start - now

    def answered(self, images: int) -> None:
        """Note an answer. After a refusal each one makes the client a little faster, and LIFTED in a row as fast as
        ever: had the service a limit, it would have refused one of them."""
        self._answered.append((self._clock(), images))
        self._in_a_row += 1
        if self.rate is not None:
            faster = self.rate * FASTER if self._in_a_row < LIFTED else float("inf")
            self.rate = self._most if faster == float("inf") else min(faster, self._most or faster)

    def refused(self, images: int, sent_at: float, after: float) -> None:
        """Be quiet for some seconds after a batch that was sent at `sent_at` was refused, and then slower.

        The first pace is what the service bore lately, if it answered a batch of this size at all. Batches that were
        on their way when the pace was lowered lower it no further.
        """
        now = self._clock()
        self._quiet_until = max(self._quiet_until, now + after)
        while self._answered and self._answered[0][0] < now - WINDOW:
            self._answered.popleft()
        seen = sum(count for _, count in self._answered)
        if sent_at < self._slowed_at or (self.rate is None and seen < max(images, 2)):
            return
        self._slowed_at, self._in_a_row = now, 0
        self.rate = SLOWER * self.rate if self.rate is not None else seen / (now + after - self._answered[0][0])
        self._next = self._quiet_until
