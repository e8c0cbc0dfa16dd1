"""`--dry-run`: what is known of each method, on mixed pools too, without running it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.core.net import net
from ray_dfml.evaluate import EPISODES_PER_JOB
from ray_dfml.methods import METHODS, cost
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime import estimate as module
from ray_dfml.runtime.driver import Inputs, Machine, read_inputs
from ray_dfml.runtime.estimate import estimate
from ray_dfml.runtime.local import LocalBackend
from tests.runtime import toy
from tests.runtime.test_keys import services


def planned(inputs: Inputs, name: str, machine: Machine = toy.LOCAL, *more: str) -> dict[str, Any]:
    return estimate(toy.config(name, None, None, *more), inputs, machine)


@pytest.fixture(scope="module")
def inputs(toy_pool: Path, toy_data: str) -> Inputs:
    return read_inputs(toy.config("free", toy_pool, toy_data))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_rounds_and_minutes_of_test(inputs: Inputs, name: str) -> None:
    found = planned(inputs, name)
    assert (found["method"], found["teachers"], found["rejected teachers"]) == (name, 4, 0)
    assert found["rounds"] == toy.config(name, None, None).method.total_rounds
    updated = name in ("free", "purer", "bidf-mkd", "no-pool", "maml-oracle")
    assert ("meta-updates" in found) == updated
    trained = updated or name in ("shared-answers", "dro")
    no_estimate = str(found.get("training minutes", "")).startswith("no estimate")
    assert ("training minutes" in found, no_estimate) == (trained or distils(name), distils(name))


def distils(name: str) -> bool:
    return METHODS[name].students is not None


def test_a_service_with_a_rate_takes_its_minutes(tmp_path: Path, toy_pool: Path) -> None:
    """24 images at 0.1 and at 0.2 a second, at the same time."""
    pool = services(toy_pool, tmp_path / "pool", "http://127.0.0.1:9", {"rate": 0.1}, {"rate": 0.2})
    config = toy.config("ideal", pool, None)
    assert estimate(config, read_inputs(config), toy.LOCAL)["minutes of asking, at least"] == "4.0"


def test_purer_is_planned_where_a_task_has_more_classes_than_one_teacher(inputs: Inputs) -> None:
    wider = dataclasses.replace(inputs, world=dataclasses.replace(inputs.world, way=3))
    assert max(len(card.classes) for card in wider.world.cards) < 3
    wide, narrow = (planned(one, "purer")["recovered images"] for one in (wider, inputs))
    assert wide == narrow > 0


def test_the_choice_of_a_step_size_is_counted(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One minute an episode: 20 at test, and 10 at validation for each candidate where there is a choice."""
    monkeypatch.setattr(cost, "seconds", lambda work: 60.0 * EPISODES_PER_JOB)
    for steps, wanted in (("[0.1,0.2,0.3]", "50.0"), ("[0.1]", "20.0"), ("[]", "20.0")):
        assert planned(inputs, "random", toy.LOCAL, f"eval.lrs={steps}")["test minutes"] == wanted
    assert planned(inputs, "random", Machine(workers=2), "eval.lrs=[]")["test minutes"] == "10.0"


@pytest.mark.parametrize(("more", "wanted"), [
    ((), ("20.0", "60.0")), (("eval.test_best=true",), ("40.0", "80.0"))
])  # fmt: skip
def test_validated_last_and_fresh_weights_are_tested(inputs: Inputs, monkeypatch, more, wanted) -> None:
    """Validation after rounds 3 and 5 of 0..5, 10 episodes each, on test episodes too for the best on test."""
    monkeypatch.setattr(cost, "seconds", lambda work: 60.0 * EPISODES_PER_JOB)
    found = planned(inputs, "free", toy.LOCAL, "eval.lrs=[]", "eval.every=4", *more)
    assert (found["validation minutes"], found["test minutes"]) == wanted


@pytest.mark.parametrize("name", ["purer", "bidf-mkd"])
def test_images_and_updates_are_those_of_a_run(inputs: Inputs, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(cost, "seconds", lambda work: 60.0)
    found = planned(inputs, name)
    backend = LocalBackend(inputs.teachers.__getitem__)
    run = Trainer(toy.config(name, None, None).model_dump(mode="json"), inputs.world, [], backend, None)
    rounds = [run.round(r) for r in range(found["rounds"])]
    assert found["meta-updates"] == str(sum(row.get("replay/updates") or 0 for row in rounds))
    images = run.state["images"] if name == "purer" else None
    made = sum(len(own["x"]) for own in images.values()) if images else rounds[-1]["bank/images"]
    assert found["recovered images"] == made


def test_the_time_of_bidf_counts_what_comes_between_its_inversions_once(inputs: Inputs, monkeypatch) -> None:
    """A job of n iterations takes 7 + 2 n minutes here: 3 rounds of 2 jobs of 3 are 78."""
    monkeypatch.setattr(bidf, "_job_seconds", lambda cfg, *_: 60.0 * (7 + 2 * cfg.iterations))
    monkeypatch.setattr(module, "_task", lambda *_: 0.0)
    assert planned(inputs, "bidf-mkd")["training minutes"] == "78.0"


def test_recovery_from_a_mixed_pool_costs_what_its_mean_teacher_does(
    mixed_pools: tuple[Path, Path], toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute a pass over the teacher of nearest cost: 6 rounds of 2 teachers and 3 passes; 10 updates of 3 tasks."""
    config = toy.config("free", None, None)
    inputs = read_inputs(config.model_copy(update={"pool": tuple(map(str, mixed_pools)), "data": (toy_data,)}))
    macs = [net(card.arch, card.image.shape, len(card.classes)).macs for card in inputs.world.cards]
    mean = sum(macs) / 4
    nearest = min(macs, key=lambda one: abs(one - mean))
    assert max(macs) > nearest, "the mean lies nearer to the smaller ResNet than to the larger"
    works: list[object] = []
    monkeypatch.setattr(cost, "seconds", lambda work: works.append(work()) or 60.0)
    wanted = 6 * 2 * 3 * mean / nearest + 10 * 3
    assert estimate(config, inputs, toy.LOCAL)["training minutes"] == f"{wanted:.1f}"
    assert len(works) == 3, "a recovery, an update and an episode were done"
