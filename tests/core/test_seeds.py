"""Seeds are names: stable across machines and versions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.core import seeds
from tests.support import PROPERTY

parts = st.lists(
    st.one_of(st.integers(0, 99), st.sampled_from(["recover", "replay", "episode"])), min_size=1, max_size=4
)


def test_two_seeds_are_pinned():
    assert seeds.derive(42, 0, "recover", 3) == 3_054_500_007_512_234_176
    assert seeds.derive("episode", 0, 5, 1, 15, 599) == 9_121_701_476_826_426_677


@PROPERTY
@given(parts, parts)
def test_seeds_are_equal_exactly_if_their_parts_are(a, b):
    assert (seeds.derive(*a) == seeds.derive(*b)) == (a == b)
    assert 0 <= seeds.derive(*a) < 2**63


def test_parts_do_not_run_together():
    assert len({seeds.derive(1, 12), seeds.derive(11, 2), seeds.derive(112), seeds.derive(12, 1)}) == 4


def test_generators_of_equal_parts_draw_equal_numbers():
    first, again, other = (seeds.rng(*p) for p in ((1, "a"), (1, "a"), (1, "b")))
    a, b, c = (torch.randn(5, generator=g) for g in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
