"""The loop around every inversion: groups, rejections, and the order of results."""

from collections.abc import Sequence

import torch

from ray_dfml.methods import recovery
from ray_dfml.types import Arrays, Job, Teacher
from tests.support import FakeShard, FakeTeacher, card, small_world


def test_groups_hold_what_one_stack_can_and_keep_the_order():
    cards = [card(0), card(1, way=3), card(2), card(3, size=20), card(4, arch="conv4-64"), card(5, channels=1), card(6)]
    teachers = [FakeTeacher(c, None, torch.zeros(1), torch.zeros(1)) for c in cards]  # type: ignore[arg-type]
    slots = [(i, Job(index=i, seed=0), teacher) for i, teacher in enumerate(teachers)]
    found = recovery.groups(slots, batched=True)
    assert [[i for i, *_ in group] for group in found] == [[0, 2, 6], [1], [3], [4], [5]]
    assert recovery.groups(slots, batched=False) == [[slot] for slot in slots]


def test_results_are_in_the_order_of_jobs_whoever_is_rejected(device):
    world = small_world(cards=4)
    for batched in (False, True):
        shard, calls = FakeShard(world, batched=batched, device=device), []
        del shard.teachers["conv4-1"]

        def invert(
            jobs: Sequence[Job], teachers: Sequence[Teacher], many: bool, calls: list[tuple[int, bool]] = calls
        ) -> list[Arrays | None]:
            calls.append((len(jobs), many))
            assert [job.teacher for job in jobs] == [teacher.card.id for teacher in teachers]
            return [None if job.teacher == "conv4-2" else {"seed": job.seed} for job in jobs]

        jobs = [Job(index=i, seed=10 + i, teacher=c.id) for i, c in enumerate(world.cards)]
        assert recovery.recover(shard, jobs, invert) == [
            {"seed": 10}, {"rejected": "conv4-1: unreadable"}, {"rejected": "the inversion loss is not finite"},
            {"seed": 13},
        ]  # fmt: skip
        assert calls == ([(3, True)] if batched else [(1, False)] * 3)
