"""Tables of numbers, as they stand in `numbers/NAME.yaml` of this package."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ray_dfml import yaml_text
from ray_dfml.errors import DfmlError, UsageError, did_you_mean

NUMBERS = Path(__file__).parent / "numbers"
"""The folder of the tables."""

Words = tuple[str, ...]
Id = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Step(_Strict):
    """One command, and what it makes.

    In all texts `{out}` is the folder of the user, `{data}` the folder RAY_DFML_DATA, `{seed}` the seed, and a key of
    `by_seed` the text for that seed.
    """

    run: Words = ()
    """Arguments of `ray-dfml`."""
    script: Words = ()
    """Instead: a Python script of `benchmarks` and its arguments, which need a checkout of the repository."""
    makes: str
    """The file or folder that the command makes, below `{out}`."""
    minutes: float = Field(ge=0)
    """What one seed took, apart from the tests."""
    queries: int = Field(default=0, ge=0)
    """Images that one seed sent to its teachers."""
    after: tuple[Name, ...] = ()
    """The steps before it."""
    by_seed: dict[str, dict[int, str]] = {}

    @model_validator(mode="after")
    def _one_command(self) -> "Step":
        if bool(self.run) == bool(self.script):
            raise ValueError("a step has either `run` or `script`")
        return self

    @property
    def every_seed(self) -> bool:
        """Whether the command is another one for each seed."""
        return "{seed}" in " ".join((*self.run, *self.script, self.makes)) or bool(self.by_seed)


class Score(_Strict):
    """The accuracies of the test episodes, or test images, of a run folder."""

    step: Name
    method: str
    shot: int | None
    selection: Literal["val", "last"]
    data: str | None = None
    """Name of the data set, or `pooled`; may be left out if the run has one."""


class Metric(_Strict):
    """A metric of the last round of a run folder that has it."""

    step: Name
    metric: str


class Rows(_Strict):
    """Accuracies of episodes in a JSON file that a script made, under keys within keys."""

    step: Name
    file: str
    key: Words


Reading = Score | Metric | Rows


class Number(_Strict):
    """A number with its interval, where it stands in a table of a page, and how it is read."""

    id: Id
    what: str
    value: float
    half: float = Field(gt=0)
    """Half-width of the 95 % interval."""
    covers: Literal["episodes", "images", "seeds"]
    """What the interval is over. Over episodes and images, seeds are averaged in each first."""
    unit: Literal["%", "points"]
    seeds: tuple[int, ...] = Field(min_length=1)
    each: tuple[float, ...]
    """The number of each seed."""
    of: Reading
    minus: Reading | None = None
    """What is taken off, in each episode or for each seed."""
    row: str | None = None
    column: str | None = None
    commit: str | None = None
    """The commit, or several, where it is not that of the table."""
    note: str | None = None

    @model_validator(mode="after")
    def _interval_has_values(self) -> "Number":
        if len(self.each) != len(self.seeds):
            raise ValueError(f"{self.id}: `each` has not one number for each seed")
        if self.covers == "seeds" and len(self.seeds) < 2:
            raise ValueError(f"{self.id}: an interval over seeds needs two seeds")
        if self.covers != "seeds" and isinstance(self.of, Metric):
            raise ValueError(f"{self.id}: a metric is one value for each seed, so its interval covers seeds")
        return self


class Table(_Strict):
    """Numbers of one measurement, with their commands."""

    name: Name
    """The name of its file."""
    title: str
    hardware: str
    commit: str | None = None
    """The commit of all numbers that name no other."""
    evidence: str
    """`run folders`, from which `benchmarks/results.py` read the numbers, or the page of `benchmarks` they stand in."""
    data: tuple[str, ...] = ()
    """Files of RAY_DFML_DATA that the commands read."""
    steps: dict[Name, Step]
    numbers: tuple[Number, ...]

    @model_validator(mode="after")
    def _steps_are_known(self) -> "Table":
        named = {name for step in self.steps.values() for name in step.after}
        named |= {read.step for one in self.numbers for read in (one.of, one.minus) if read is not None}
        if named - set(self.steps):
            raise ValueError(f"no such step: {', '.join(sorted(named - set(self.steps)))}")
        unknown = [one.id for one in self.numbers if not self.commit_of(one)]
        if unknown:
            raise ValueError(f"{unknown[0]}: neither it nor the table names a commit")
        return self

    def commit_of(self, number: Number) -> str | None:
        """The commit that a number was made at."""
        return number.commit or self.commit

    def needed(self, number: Number) -> list[tuple[str, Step]]:
        """The steps that a number needs, each after those it builds on."""
        found: dict[str, Step] = {}

        def add(name: str) -> None:
            for before in self.steps[name].after:
                add(before)
            found.setdefault(name, self.steps[name])

        for reading in (number.of, number.minus):
            if reading is not None:
                add(reading.step)
        return list(found.items())

    def minutes(self, number: Number) -> float:
        """What the steps of a number took in all."""
        return sum(s.minutes * (len(number.seeds) if s.every_seed else 1) for _, s in self.needed(number))


def read(file: Path) -> Table:
    """The table in a file. Raises DfmlError if it is none."""
    try:
        return Table.model_validate({"name": file.stem} | yaml_text.load(file.read_bytes()))
    except (yaml.YAMLError, ValidationError, ValueError, TypeError) as error:
        raise DfmlError(f"{file}: not a table of numbers: {' '.join(str(error).split())}") from None


@cache
def tables() -> Mapping[str, Table]:
    """All tables by name. Raises DfmlError for a file that is none, and for an id that stands twice."""
    found = {file.stem: read(file) for file in sorted(NUMBERS.glob("*.yaml"))}
    ids = [one.id for table in found.values() for one in table.numbers]
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise DfmlError(f"{NUMBERS}: two numbers have the id {twice[0]}")
    return found


def numbers(known: Mapping[str, Table] | None = None) -> Iterator[tuple[Table, Number]]:
    """All numbers, each with its table."""
    for table in (tables() if known is None else known).values():
        for one in table.numbers:
            yield table, one


def find(id: str) -> tuple[Table, Number]:
    """The number of an id. Raises UsageError with the nearest id if there is none."""
    for table, one in numbers():
        if one.id == id:
            return table, one
    raise UsageError(
        f"{id}: no number has this id{did_you_mean(id, [one.id for _, one in numbers()])}; "
        "`ray-dfml reproduce --list` shows all"
    )


def filled(texts: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Texts with their placeholders replaced. Other braces stay as they are."""
    made = []
    for text in texts:
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", value)
        made.append(text)
    return made
