"""The configuration of a run. It is typed and strict, and it is resolved once.

A profile or a preset is a set of values and nothing more. The defaults are the profile `fixed`. The values of another
profile, then those of the preset, then each `--set key=value` override them. Unknown keys are errors.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from ray_dfml import yaml_text
from ray_dfml.core.backbones import known_arch
from ray_dfml.core.inner_loop import Head
from ray_dfml.data import quarantine, specs
from ray_dfml.data.pretrain import PretrainConfig
from ray_dfml.errors import UsageError, did_you_mean
from ray_dfml.evaluate import EvalConfig
from ray_dfml.files import located, resolved
from ray_dfml.methods import METHODS, no_pool
from ray_dfml.methods import start as start_of
from ray_dfml.methods.base import MethodConfig


class LearnerConfig(BaseModel):
    """Settings of the few-shot learner. Its input is the largest channels, height and width among the teachers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arch: str = Field(default="conv4", description="Architecture of the learner.")
    head: Head = Field(
        default="maml",
        description="What adapts to a support: all weights (maml), the head (anil), nothing (protonet).",
    )
    way: int | None = Field(
        default=None, ge=2, description="Classes of an episode; by default those of the teacher with the fewest."
    )
    start: str = Field(
        default=start_of.RANDOM,
        description="Weights before the method: random, the teachers' average, or meta-trained by no-pool or a preset.",
    )

    @field_validator("arch")
    @classmethod
    def _known(cls, name: str) -> str:
        return known_arch(name)

    @field_validator("start")
    @classmethod
    def _known_start(cls, name: str) -> str:
        if name not in start_of.STARTS:
            raise ValueError(
                f"no start {name!r}{did_you_mean(name, start_of.STARTS)}; known: {', '.join(start_of.STARTS)}"
            )
        return name


class BudgetConfig(BaseModel):
    """What a run may spend on questions to teachers. The budgets of the pool hold beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queries: int | None = Field(default=None, ge=1, description="Most images sent to all teachers together.")
    money: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="Most that all of them may cost.")
    per_teacher: int | None = Field(default=None, ge=1, description="Most images sent to each teacher.")


class ChoiceConfig(BaseModel):
    """Which teachers of its pools a run uses, and how many of them are spoiled on purpose: `--set pool.*`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: int | None = Field(default=None, ge=1, description="How many teachers are used, drawn by the run's seed.")
    min_accuracy: float | None = Field(
        default=None, ge=0, le=100, description="Lowest reported accuracy in percent of a teacher that is used."
    )
    without: tuple[str, ...] = Field(
        default=(), description="Ids of teachers that are left out, or the file of a list of them (.yaml)."
    )
    fraction_poisoned: float = Field(
        default=0.0, ge=0, le=1, description="Share of the used teachers whose weights are shuffled, drawn by the seed."
    )


class RunConfig(BaseModel):
    """Everything that decides the numbers of a run. Shards and devices do not, so they are not here.

    The budget decides only how far a run goes, so a run that is resumed may have another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Method.")
    profile: str = Field(default="fixed", description="fixed, paper or code.")
    preset: str | None = Field(default=None, description="Named set of values, if one was used.")
    seed: int = Field(default=0, ge=0, description="Run seed: every random draw derives from it.")
    pool: tuple[str, ...] = Field(default=(), description="Pool folders: paths, or URIs of an object store.")
    data: tuple[str, ...] = Field(
        default=(), description="Data specs for validation and test; empty is truly data-free."
    )
    choice: ChoiceConfig = ChoiceConfig()
    learner: LearnerConfig = LearnerConfig()
    method: SerializeAsAny[MethodConfig]
    eval: EvalConfig = EvalConfig()
    budget: BudgetConfig = BudgetConfig()
    start: no_pool.Config | None = Field(
        default=None, description="Settings of `no-pool`, if the learner starts after it."
    )

    @property
    def start_rounds(self) -> int:
        """The first rounds of the run, which make the learner's start."""
        return start_of.rounds(self.learner.start, self.start)

    @property
    def total_rounds(self) -> int:
        """The rounds of the start, and those of the method."""
        return self.start_rounds + self.method.total_rounds

    def validates(self, r: int) -> bool:
        """Whether round r ends with a validation.

        One is due every `eval.every` rounds of the method, and after the last round.
        """
        r -= self.start_rounds
        if r < 0:
            return False
        every = self.eval.every or max(1, math.ceil(self.method.total_rounds / 20))
        return r % every == every - 1 or r == self.method.total_rounds - 1


PROFILES = ("fixed", "paper", "code")
"""`fixed` is the defaults. The others apply the changes that a method lists for them, and PUBLISHED_TEST."""

PUBLISHED_TEST: Mapping[str, Any] = {"eval": {"lrs": ()}}
"""What the profiles `paper` and `code` change for every method: no step size at test is chosen, `eval.lr` is used."""

SECTIONS = ("method", "eval", "learner", "budget", "start", "pool")
"""What `--set` may change: parts of a RunConfig, and `pool` for its `choice`. The others have options of their own."""


def presets() -> dict[str, str]:
    """Name of a preset -> name of the method that it is for."""
    return {preset: name for name, method in METHODS.items() for preset in method.presets}


def parse_set(text: str) -> tuple[list[str], Any]:
    """Parse `a.b=c` into (["a", "b"], value), where the value is read as YAML. Raises UsageError without an `=`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text}: expected key=value, for example --set method.rounds=100")
    try:
        return key.strip().split("."), yaml_text.load(value)
    except yaml.YAMLError:
        return key.strip().split("."), value


def resolve(
    name: str, *, profile: str = "fixed", preset: str | None = None, settings: Sequence[str] = (), **values: Any
) -> RunConfig:
    """The full configuration of method `name`. The paths in `pool` and `data` become absolute.

    Raises UsageError, whose message is one line, for anything unknown or out of range.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}{did_you_mean(name, METHODS)}; known: {', '.join(METHODS)}")
    values["pool"] = tuple(str(located(path)) for path in values.get("pool", ()))
    values["data"] = tuple(specs.absolute(spec) for spec in values.get("data", ()))
    tree: dict[str, Any] = {"name": name, "profile": profile, "preset": preset, **values}
    tree["method"] = METHODS[name].Config().model_dump()
    if profile not in PROFILES:
        raise UsageError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
    _merge(tree, METHODS[name].profiles.get(profile, {}))
    if profile != "fixed":
        _merge(tree, PUBLISHED_TEST)
    if preset is not None:
        known = presets()
        if preset not in known:
            raise UsageError(f"unknown preset {preset!r}{did_you_mean(preset, known)}; known: {', '.join(known)}")
        if known[preset] != name:
            raise UsageError(f"preset {preset!r} is for {known[preset]}, not for {name}")
        _merge(tree, METHODS[name].presets[preset].values)
    for text in settings:
        path, value = parse_set(text)
        if path[0] in RunConfig.model_fields and path[0] not in SECTIONS:
            raise UsageError(f"--set {text}: {path[0]} has an option of its own; --set takes {', '.join(SECTIONS)}")
        if path[0] == "pool":
            if len(path) == 1:
                raise UsageError(
                    f"--set {text}: name pools with --pool; pool.* is {', '.join(ChoiceConfig.model_fields)}"
                )
            path = ["choice", *path[1:]]
            if path[1] == "without" and isinstance(value, str) and value.endswith(quarantine.SUFFIXES):
                value = list(quarantine.read(resolved(value)))
        value = _listed({"method": METHODS[name].Config, "start": no_pool.Config}.get(path[0], RunConfig), path, value)
        for key in reversed(path):
            value = {key: value}
        _merge(tree, value)
    tree["start"] = _start(tree)
    return build(tree)


def _start(tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """All settings of the start in a tree, if it has any: the defaults of `no-pool`, its preset, and what is given."""
    start, given = str(tree.get("learner", {}).get("start", start_of.RANDOM)), tree.get("start") or {}
    if not start_of.meta_trains(start):
        if given:
            raise UsageError(f"start.{next(iter(given))} is a setting of learner.start=no-pool; set that too")
        return None
    values = no_pool.Config().model_dump()
    if start in no_pool.PRESETS:
        _merge(values, no_pool.PRESETS[start].values["method"])
    _merge(values, given)
    return values


def with_budget(config: RunConfig, settings: Sequence[str]) -> RunConfig:
    """A configuration with other budgets, from `budget.x=y`. Raises UsageError for anything else."""
    tree = config.model_dump(mode="json")
    for text in settings:
        path, value = parse_set(text)
        if path[0] != "budget" or len(path) != 2:
            raise UsageError(
                f"--set {text}: --resume takes its settings from the run folder; only budget.* may change, for "
                "example --set budget.queries=20000"
            )
        tree["budget"][path[1]] = value
    return build(tree)


def build(tree: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from a nested mapping, as `config.yaml` holds it. Raises UsageError with a message of one line."""
    if not isinstance(tree, Mapping):
        raise UsageError(f"config: expected keys and values, got {tree!r}")
    tree = dict(tree)
    name = str(tree.get("name"))
    if name not in METHODS:
        raise UsageError(f"config: unknown method {name!r}; known: {', '.join(METHODS)}")
    try:
        tree["method"] = METHODS[name].Config.model_validate(tree.get("method") or {})
    except ValidationError as error:
        raise UsageError(_one_line(error, METHODS[name].Config, "method")) from None
    try:
        tree["start"] = tree.get("start") and no_pool.Config.model_validate(tree["start"])
    except ValidationError as error:
        raise UsageError(_one_line(error, no_pool.Config, "start")) from None
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_one_line(error, RunConfig, "")) from None
    start = config.learner.start
    if start != start_of.RANDOM and (METHODS[name].baseline or METHODS[name].students):
        raise UsageError(f"learner.start={start}: {name} trains no learner that could start elsewhere; leave it out")
    if start_of.meta_trains(start) == (config.start is None):
        raise UsageError(f"config: learner.start is {start}, and the section start does not fit it")
    return config


def pretrain_config(settings: Sequence[str]) -> PretrainConfig:
    """The recipe of `pool build` from its `--set pretrain.x=y`. Raises UsageError for other keys."""
    tree: dict[str, Any] = {}
    for text in settings:
        path, value = parse_set(text)
        if path[0] != "pretrain" or len(path) != 2:
            raise UsageError(f"--set {text}: pool build takes pretrain.* only")
        tree[path[1]] = _listed(PretrainConfig, path, value)
    try:
        return PretrainConfig.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_one_line(error, PretrainConfig, "pretrain")) from None


def _listed(model: type[BaseModel], path: Sequence[str], value: Any) -> Any:
    """Turn a value into a list if the setting at `path` is one: text with commas gives several items.

    `model` is the model of the first part of the path, or a model that has this part as a field.
    """
    fields, annotation = model.model_fields, None
    for key in path if path[0] in fields else path[1:]:
        annotation = fields[key].annotation if key in fields else None
        fields = getattr(annotation, "model_fields", {})
    kinds = {get_origin(part) for part in (annotation, *get_args(annotation))}  # it may be `tuple[int, ...] | None`
    if tuple not in kinds or value is None or isinstance(value, list | dict):
        return value
    return [yaml_text.load(part) for part in value.split(",")] if isinstance(value, str) else [value]


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, Mapping):
            into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value


def _one_line(error: ValidationError, model: type[BaseModel], prefix: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in ([prefix] if prefix else []) + list(first["loc"]))
    if where.startswith("choice."):
        where = where.replace("choice", "pool", 1)
    if first["type"] == "extra_forbidden":
        fields: dict[str, Any] = dict(model.model_fields)
        for part in first["loc"][:-1]:
            inner = fields[str(part)].annotation
            fields = dict(getattr(inner, "model_fields", {}))
        hint = did_you_mean(str(first["loc"][-1]), fields)
        return f"config: unknown key {where}{hint}; known there: {', '.join(fields)}"
    said = first["msg"].removeprefix("Value error, ")
    whole = isinstance(first.get("input"), Mapping)  # settings that do not fit each other: all of them are no help
    return f"config: {where}: {said[0].lower()}{said[1:]}" + ("" if whole else f", got {first.get('input')!r}")
