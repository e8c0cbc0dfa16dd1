"""A short form of benchmarks/faults.py: the counts agree to the image, whatever is spoilt and whoever is killed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.chaos import Processes, disturbed, nursery


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with nursery(tmp_path_factory.mktemp("processes"), first_wait=0.01) as found:
        yield found


@pytest.mark.parametrize(("seed", "client_kills"), [(0, 0), (1, 3)])
def test_the_counts_agree_whatever_happens(
    seed: int, client_kills: int, processes: Processes, toy_pool: Path, tmp_path: Path
) -> None:
    found = disturbed(
        processes, tmp_path, toy_pool, seed=seed, images=240, batch=6, rate=0.4, client_kills=client_kills,
        timeout=0.7, between=(0.05, 0.4),
    )  # fmt: skip
    assert found.sent > found.images
    assert found.client_kills == client_kills
    assert client_kills or found.sent == found.seen
    assert sum(found.faults.values()) - found.faults[""] >= 10
