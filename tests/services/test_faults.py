"""A short form of benchmarks/faults.py: the counts agree to the image, whatever is spoilt and whoever is killed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.chaos import Processes, disturbed, disturbed_training, nursery


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with nursery(tmp_path_factory.mktemp("processes"), first_wait=0.01) as found:
        yield found


@pytest.mark.parametrize(("seed", "client_kills"), [(0, 0), (1, 3)])
def test_the_counts_agree_whatever_happens(
    seed: int, client_kills: int, processes: Processes, toy_pool: Path, tmp_path: Path
) -> None:
    found = disturbed(
        processes, tmp_path, toy_pool, seed=seed, images=180, batch=6, rate=0.4, client_kills=client_kills,
        timeout=0.7, between=(6, 30),
    )  # fmt: skip
    assert found.sent > found.images
    assert found.client_kills == client_kills
    assert client_kills or found.sent == found.seen
    assert sum(found.faults.values()) - found.faults[""] >= 10


SETTINGS = (
    "method.budget=96", "method.batch=8", "method.first=8", "method.growth=0", "method.student=conv4",
    "method.student_batch=4", "method.steps=1", "method.last_steps=2", "method.images=[dip,mutants]",
)  # fmt: skip


def test_a_student_has_the_same_bits_whatever_happens(processes: Processes, toy_pool: Path, tmp_path: Path) -> None:
    students = []
    for rate, kills in ((0.0, 0), (0.4, 2)):
        folder = tmp_path / str(kills)
        folder.mkdir()
        found, student = disturbed_training(
            processes, folder, toy_pool, seed=0, batch=8, rate=rate, kills=kills, timeout=0.7, between=(8, 24),
            settings=SETTINGS,
        )  # fmt: skip
        assert found.images == 96
        assert (found.sent > 96) == (rate > 0)
        assert found.client_kills == kills
        students.append(student)
    assert students[0] == students[1]
