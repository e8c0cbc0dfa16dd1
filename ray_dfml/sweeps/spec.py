"""The file of a sweep: what it may say, and how it is read. Unknown keys are errors that name the nearest one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator

from ray_dfml import yaml_text
from ray_dfml.data.pretrain import PretrainConfig
from ray_dfml.errors import UsageError, did_you_mean

MOST_BYTES = 1 << 20
"""Size of the largest file that is read."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PoolRecipe(_Strict):
    """A pool that the sweep builds for itself, in its own folder, as `ray-dfml pool build` does."""

    data: str = Field(description="Data spec whose training split the teachers learn.")
    models: int = Field(ge=1, description="Teachers.")
    archs: tuple[str, ...] = Field(default=("conv4",), description="Their architectures, in turn.")
    way: int = Field(default=5, ge=2, description="Classes of a teacher.")
    seed: int = Field(default=0, ge=0, description="Seed of the pool.")
    epochs: int = Field(default=PretrainConfig().epochs, ge=1, description="Epochs of each teacher.")
    access: Literal["weights", "logits", "probs", "label"] = Field(
        default="weights", description="What the teachers give away."
    )


class Scheduler(_Strict):
    """Which trials are stopped early, or go on with other settings."""

    type: Literal["none", "asha", "pbt"] = Field(default="none", description="none, asha or pbt.")
    grace: int = Field(default=1, ge=1, description="asha: rounds before a trial may be stopped.")
    reduction: float = Field(
        default=3.0, gt=1, allow_inf_nan=False, description="asha: one in so many trials goes on from each rung."
    )
    interval: int = Field(default=1, ge=1, description="pbt: rounds between two exchanges.")
    quantile: float = Field(
        default=0.25, gt=0, le=0.5, description="pbt: share of the trials that take over a better one's state."
    )
    resample: float = Field(
        default=0.25, ge=0, le=1, description="pbt: chance that a setting is drawn anew instead of moved."
    )


class Budget(_Strict):
    """What each trial may spend on questions, as `--set budget.*` says."""

    queries: int | None = Field(default=None, ge=1, description="Most images sent to all teachers together.")
    money: float | None = Field(default=None, gt=0, description="Most that all of them may cost.")
    per_teacher: int | None = Field(default=None, ge=1, description="Most images sent to each teacher.")


def _kind(value: Any) -> str:
    return "recipe" if isinstance(value, Mapping | PoolRecipe) else "folders"


Pools = Annotated[
    Annotated[tuple[str, ...], Tag("folders")] | Annotated[PoolRecipe, Tag("recipe")], Discriminator(_kind)
]


class Sweep(_Strict):
    """A sweep. `set` and `space` hold settings of the method's own configuration, nested as in `config.yaml`."""

    method: str = Field(description="Method.")
    profile: str = Field(default="fixed", description="fixed, paper or code.")
    preset: str | None = Field(default=None, description="Named settings.")
    pool: Pools = Field(default=(), description="Pool folders, or the recipe of a pool.")
    data: tuple[str, ...] = Field(default=(), description="Data specs for validation and test.")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, description="Run seeds; each point is run on all.")
    samples: int = Field(default=1, ge=1, description="Draws of the random axes, at each point of the grids.")
    search: Literal["optuna"] | None = Field(default=None, description="optuna, or independent draws without it.")
    batch: int = Field(default=4, ge=1, description="optuna: points that it proposes at a time.")
    search_seed: int = Field(default=0, ge=0, description="Seed of the draws.")
    defaults: bool = Field(default=False, description="Whether the settings without the space are a point too.")
    winners: int = Field(default=1, ge=1, description="How many of the best points are tested.")
    scheduler: Scheduler = Scheduler()
    budget: Budget = Budget()
    set: dict[str, Any] = Field(default={}, description="Settings that all trials have.")
    space: dict[str, Any] = Field(description="Settings that vary.")

    @field_validator("pool", "data", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        """`seeds: 3` means 0, 1 and 2."""
        return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("expected different seeds of 0 or more")
        return seeds


def read(path: Path, *, small: bool = False) -> Sweep:
    """Read the file of a sweep. With `small` the values under its key `small` replace those above.

    Raises UsageError with one line that names the file and the fault.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise UsageError(f"{path}: larger than {MOST_BYTES >> 20} MiB, so it is no sweep")
        tree = yaml_text.load(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; name the YAML file of a sweep") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected keys such as method, pool and space")
    smaller = tree.pop("small", None)
    if small:
        if not isinstance(smaller, dict):
            raise UsageError(f"{path}: has no key `small`; leave out --small")
        tree = _over(tree, smaller)
    return build(tree, f"{path}")


def build(tree: Mapping[str, Any], where: str) -> Sweep:
    """A sweep from a nested mapping. Raises UsageError, whose line begins with `where`."""
    try:
        return Sweep.model_validate(tree)
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        place = [str(part) for part in first["loc"] if part not in ("folders", "recipe")]
        if first["type"] == "extra_forbidden":
            known = _fields(place[:-1])
            raise UsageError(
                f"{where}: unknown key {'.'.join(place)}{did_you_mean(place[-1], known)}; known: {', '.join(known)}"
            ) from None
        said = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}: {'.'.join(place)}: {said[0].lower()}{said[1:]}") from None


def _fields(place: list[str]) -> list[str]:
    models = {"scheduler": Scheduler, "budget": Budget, "pool": PoolRecipe}
    return list((models[place[0]] if place else Sweep).model_fields)


def _over(tree: Mapping[str, Any], smaller: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with the values of another one over its own. `space`, `pool` and `scheduler` are replaced as a whole."""
    merged = dict(tree)
    for key, value in smaller.items():
        if key == "set" and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = deep(merged[key], value)
        else:
            merged[key] = value
    return merged


def deep(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping with another one over it, key by key."""
    merged = dict(tree)
    for key, value in over.items():
        mine = merged.get(key)
        merged[key] = deep(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return merged
