"""The line that a long command says first: time, queries and money."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ray_dfml.errors import RejectedError
from ray_dfml.runtime import cost_lines
from ray_dfml.runtime.driver import Machine, read_inputs
from ray_dfml.runtime.estimate import Forecast
from tests.runtime import toy
from tests.runtime.test_keys import services

Command = Callable[..., toy.Done]

FORECAST = Forecast(
    training=(600.0, 1200.0), validation=60.0, test=90.0, asking=0.0, images=0, updates=(3, 5)
)  # fmt: skip


@pytest.mark.parametrize(("span", "said"), [
    ((0.04,), "0 s"), ((3.26,), "3.3 s"), ((119.4,), "119 s"), ((120.0,), "2 min"), ((30.0, 200.0), "0.5 to 3.3 min"),
    ((600.0, 600.4), "10 min"), ((7200.0,), "2 h"), ((1000.0, 90000.0), "0.3 to 25 h"),
])  # fmt: skip
def test_a_time_has_the_unit_that_suits_it(span: tuple[float, ...], said: str) -> None:
    assert cost_lines.duration(*span) == said


def test_a_run_says_what_all_of_it_takes_and_after_a_resume_what_is_left(
    toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy.config("free", toy_pool, toy_data)
    inputs = read_inputs(config)
    monkeypatch.setattr(cost_lines, "forecast", lambda *_: FORECAST)
    assert cost_lines.of_run(config, inputs, Machine(workers=2)) == (
        "cost: about 12 to 22 min on 2 shards (training 10 to 20 min, validation 60 s, test 90 s); nobody is asked"
    )
    assert cost_lines.of_run(config, inputs, toy.LOCAL, done=3) == (
        "cost: about 7 to 12 min on 1 process (training 5 to 10 min, validation 30 s, test 90 s); nobody is asked"
    )


def test_a_sweep_says_what_a_trial_takes_and_all_of_them(
    toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy.config("free", toy_pool, toy_data)
    inputs = read_inputs(config)
    monkeypatch.setattr(cost_lines, "forecast", lambda *_: FORECAST)
    assert cost_lines.of_sweep(3, [config], inputs, toy.LOCAL, None, 2) == (
        "cost: 11 to 21 min a trial, and 90 s a test of each of 2 runs: together at most 66 min one after another; "
        "nobody is asked"
    )
    assert cost_lines.of_sweep(3, [config], inputs, toy.LOCAL, 2, 0) == (
        "cost: 11 to 21 min a trial: together at most 32 min, 2 at a time; nobody is asked"
    )


def test_queries_and_money_are_named(tmp_path: Path, toy_pool: Path) -> None:
    """24 images of two services, at 0.1 a second and 0.5 in money, and at 0.2 a second and nothing."""
    pool = services(toy_pool, tmp_path / "pool", "http://127.0.0.1:9", {"rate": 0.1}, {"rate": 0.2})
    content = yaml.safe_load((pool / "pool.yaml").read_text())
    content["teachers"][0]["price"] = 0.5
    (pool / "pool.yaml").write_text(yaml.safe_dump(content))
    config = toy.config("ideal", pool, None, "pool.limit=2")
    said = cost_lines.of_run(config, read_inputs(config), toy.LOCAL)
    assert said == (
        "cost: about 4 min on 1 process; how long the distillation takes is not known; 48 queries to 2 teachers, 12 in "
        "money, 4 min at their rates"
    )


def test_a_trial_that_fails_is_no_fault_of_the_run(toy_pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Forecast:
        raise RejectedError("a teacher\nis damaged")

    config = toy.config("free", toy_pool, None)
    inputs = read_inputs(config)
    monkeypatch.setattr(cost_lines, "forecast", fails)
    assert cost_lines.of_run(config, inputs, toy.LOCAL) == (
        "cost: no estimate, since a trial of the work failed: a teacher is damaged"
    )


def test_training_building_and_testing_say_it_first(
    tmp_path: Path, toy_pool: Path, toy_data: str, command: Command
) -> None:
    words = ("--pool", toy_pool, "--data", toy_data, "--backend", "local", *toy.flags("random"))
    done = command("train", "random", "--run-dir", tmp_path / "run", *words)
    line = r"cost: about .* on 1 process \(.*test .*\); nobody is asked"
    assert sum(re.fullmatch(line, one) is not None for one in done.err.splitlines()) == 1, done.err
    quiet = command("train", "random", "--run-dir", tmp_path / "quiet", *words, "--quiet")
    assert "cost" not in quiet.err
    done = command("evaluate", tmp_path / "run", "--data", toy_data, "--shot", 1, "--episodes", 10)
    assert re.match(r"cost: about .* in 1 process; nobody is asked\n", done.err), done.err
    words = ("--data", toy_data, "--way", 2, "--models", 2, "--workers", 1, "--set", "pretrain.epochs=1")
    done = command("pool", "build", *words, "--out", tmp_path / "pool")
    first, second, *_ = done.err.splitlines()
    assert re.fullmatch(r"cost: about .* for 2 teachers of 1 epochs in 1 process; nobody is asked", first)
    assert "held-out accuracy" in second
