"""The line that a long command says before it begins: the time that it will take, and what it asks of services.

The time is measured: a small piece of each kind of work is done once, on this machine, and multiplied. A piece that
cannot be done gives a line that says why; the work itself then meets the same fault, or leaves the teacher out.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from ray_dfml.config import RunConfig
from ray_dfml.data.pretrain import PretrainConfig
from ray_dfml.errors import DfmlError
from ray_dfml.methods import METHODS
from ray_dfml.runtime import build_pool
from ray_dfml.runtime.build_pool import Planned
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.estimate import Forecast, forecast, queries
from ray_dfml.runtime.inputs import Inputs


def duration(least: float, most: float | None = None) -> str:
    """A time, or a range of times, in a unit that suits it, such as `40 s`, `3.5 to 8 min` or `2.1 h`."""
    top = least if most is None else most
    unit, size = next(((unit, size) for unit, size, end in _UNITS if top < end), ("h", 3600))
    words = list(dict.fromkeys(_rounded(seconds / size) for seconds in (least, top)))
    return f"{' to '.join(words)} {unit}"


_UNITS = (("s", 1, 120), ("min", 60, 7200))


def _rounded(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:.0f}"


def line(say_cost: Callable[[], str]) -> str:
    """`cost: ` with what `say_cost` measures, or with the reason why it could not."""
    threads = torch.get_num_threads()
    try:
        return f"cost: {say_cost()}"
    except (DfmlError, ArithmeticError, ValueError, RuntimeError, MemoryError) as error:
        return f"cost: no estimate, since a trial of the work failed: {' '.join(str(error).split())[:200]}"
    finally:
        torch.set_num_threads(threads)


def of_run(config: RunConfig, inputs: Inputs, machine: Machine, done: int = 0) -> str:
    """The line of a run that goes on after `done` rounds."""
    return line(lambda: _run(config, inputs, machine, done))


def _run(config: RunConfig, inputs: Inputs, machine: Machine, done: int) -> str:
    whole = forecast(config, inputs, machine)
    left = whole.after(done / config.total_rounds)
    parts = {"validation": (left.validation,) * 2, "test": (left.test,) * 2}
    if left.training is not None:
        parts = {"training": left.training} | parts
    known = ", ".join(f"{name} {duration(*span)}" for name, span in parts.items() if span[1] > 0)
    said = f"about {duration(*left.span)} on {_shards(machine)}" + (f" ({known})" if known else "")
    if left.training is None and METHODS[config.name].students is not None:
        said += "; how long the distillation takes is not known"
    return f"{said}; {_asked(config, inputs, left, done)}"


def of_pool(spec: str, planned: Sequence[Planned], cfg: PretrainConfig, workers: int) -> str:
    """The line before the planned teachers that a pool lacks are trained in so many processes at a time."""
    return line(lambda: (
        f"about {duration(build_pool.seconds(spec, planned, cfg) / workers)} for {len(planned)} teachers of "
        f"{cfg.epochs} epochs in {_processes(workers)}; nobody is asked"
    ))  # fmt: skip


def of_evaluation(seconds: Callable[[], float], shards: int) -> str:
    """The line before a test, of which `seconds` measures how long it takes in one process."""
    return line(lambda: f"about {duration(seconds() / shards)} in {_processes(shards)}; nobody is asked")


def of_attribution(seconds: Callable[[], float]) -> str:
    """The line before an attribution, of which `seconds` measures how long it takes."""
    return line(lambda: f"about {duration(seconds())} in 1 process; nobody is asked")


def of_check(seconds: Callable[[], float], teachers: int, asked: Mapping[str, float]) -> str:
    """The line before a pool of so many teachers is examined. `asked` is service -> price of an image."""
    money = f", {sum(asked.values()):g} in money" if any(asked.values()) else ""
    who = f"{len(asked)} {'query' if len(asked) == 1 else 'queries'}{money}" if asked else "nobody is asked"
    return line(lambda: f"about {duration(seconds())} for {teachers} teachers in 1 process; {who}")


def of_sweep(
    trials: int, first: Sequence[RunConfig], inputs: Inputs, machine: Machine, at_once: int | None, tests: int
) -> str:  # fmt: skip
    """The line before a sweep of so many trials, at most so many at once, and of `tests` runs that are tested.

    `first` are configurations of trials that should differ most in their time.
    """
    return line(lambda: _sweep(trials, first, inputs, machine, at_once, tests))


def _sweep(
    trials: int, first: Sequence[RunConfig], inputs: Inputs, machine: Machine, at_once: int | None, tests: int
) -> str:  # fmt: skip
    found = [forecast(config, inputs, machine) for config in first]
    spans = [(least - one.test, most - one.test) for one in found for least, most in [one.span]]
    least, most = min(low for low, _ in spans), max(high for _, high in spans)
    test, side = max(one.test for one in found), at_once or 1
    said = f"{duration(least, most)} a trial" + (f", and {duration(test)} a test of each of {tests} runs" * bool(tests))
    said += f": together at most {duration((trials * most + tests * test) / side)}"
    said += f", {side} at a time" if at_once else " one after another"
    planned = max((queries(config, inputs) for config in first), key=lambda one: one["images"])
    if not planned["images"]:
        return f"{said}; nobody is asked"
    money = f" and {trials * planned['money']:g} in money" if planned["money"] else ""
    return f"{said}; at most {trials * planned['images']:,} queries{money}"


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def _shards(machine: Machine) -> str:
    count = machine.workers if machine.backend == "ray" else 1
    return "1 process" if machine.backend == "local" else f"{count} shard{'s' if count > 1 else ''}"


def _asked(config: RunConfig, inputs: Inputs, left: Forecast, done: int) -> str:
    """What is asked of teachers. What a run that goes on has asked already is not asked, or paid for, again."""
    planned = queries(config, inputs)
    if not planned["images"]:
        return "nobody is asked"
    asked = sum(one["images"] > 0 for one in planned["teachers"].values())
    said = f"{'at most ' * bool(done)}{planned['images']:,} queries to {asked} teacher{'s' if asked > 1 else ''}"
    if planned["money"]:
        said += f", {planned['money']:g} in money"
    return said + (f", {duration(left.asking)} at their rates" if left.asking else "")
