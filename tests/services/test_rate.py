"""The bucket holds a rate in the long run, and any batch passes once the debt of the one before is paid."""

import numpy as np
import pytest

from ray_dfml.services.rate import Bucket


class Clock:
    """A time that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_debt_is_paid_before_the_next_batch() -> None:
    clock = Clock()
    bucket = Bucket(10.0, clock)
    assert bucket.take(25) == 0
    assert bucket.take(1) == pytest.approx(1.5, abs=0.01)
    assert bucket.take(1) == pytest.approx(1.5, abs=0.01), "a refusal takes nothing"
    clock.now = 1.4
    assert bucket.take(1) > 0
    clock.now += bucket.take(1)
    assert bucket.take(1) == 0, "the time that was said is enough"


def test_the_rate_holds_in_the_long_run_and_idle_time_saves_up_one_second() -> None:
    clock, rng, passed = Clock(), np.random.default_rng(0), 0
    bucket = Bucket(100.0, clock)
    clock.now = 1000.0
    for _ in range(2000):
        count = int(rng.integers(1, 300))
        while wait := bucket.take(count):
            clock.now += wait
        passed += count
        clock.now += float(rng.random())
    assert passed <= 100 * (clock.now - 1000) + 100 + 300
    assert passed >= 0.95 * 100 * (clock.now - 1000)
