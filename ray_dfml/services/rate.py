"""A bound on images per second."""

import time
from collections.abc import Callable


class Bucket:
    """A bucket of tokens that fills at `rate` a second and holds those of one second.

    Whatever is left allows one more request of any size, and the debt is paid off before the next one. So the rate
    holds in the long run, and a batch that is larger than the bucket still passes.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._left, self._time = rate, clock()

    def take(self, count: int) -> float:
        """Take `count` tokens and return 0, or take none and return the seconds until some are left."""
        now = self._clock()
        self._left = min(self._rate, self._left + (now - self._time) * self._rate)
        self._time = now
        if self._left <= 0:
            return -self._left / self._rate + 1e-3
        self._left -= count
        return 0.0
