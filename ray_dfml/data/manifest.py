"""The schema of `pool.yaml`: what an entry may say, how the file is read and written, and how faults are named."""

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from ray_dfml import object_store, yaml_text
from ray_dfml.core.net import known_teacher
from ray_dfml.data import weights_file
from ray_dfml.data.services import Api, Terms
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.files import Uri, is_readable, shown
from ray_dfml.types import Access, ImageSpec, TeacherCard

MANIFEST = "pool.yaml"
FREE = Terms()
"""The terms of a teacher that may be asked without end and for nothing."""
MANIFEST_BYTES = 64 << 20
"""Size of the largest manifest that is parsed."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def _readable(text: str) -> str:
    if not is_readable(text):
        raise ValueError(f"expected one line of printable text, got '{shown(text)}'")
    return text


def is_id(text: str) -> bool:
    """Whether a text can be the id of a teacher."""
    return bool(_ID.fullmatch(text))


def _safe_id(text: str) -> str:
    if not is_id(text):
        raise ValueError(
            f"{text!r}: an id has letters, digits, '.', '_' and '-' only, and begins with a letter or a digit"
        )
    return text


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise ValueError(f"{path!r} leaves the pool folder; expected a relative path such as weights/ID.safetensors")
    if not path.endswith(".safetensors"):
        raise ValueError(
            f"{path!r} is not a .safetensors file; add others with `ray-dfml pool add`, which converts them"
        )
    return path


Text = Annotated[str, AfterValidator(_readable)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Input(_Strict):
    """Size of the images that a teacher takes, in pixels."""

    channels: int = Field(ge=1, le=64)
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)


class Accuracy(_Strict):
    """Accuracies in percent as the owner states them, or null if unknown."""

    reported: Percent | None = None
    best: Percent | None = None
    """of the best epoch"""
    last: Percent | None = None
    """of the weights that are saved"""


class Entry(Terms, _Strict):
    """One teacher of `pool.yaml`: weights in the pool, or a prediction service.

    Where `access` is not `weights`, the teacher is only asked, even if its weights are here. A service needs no
    architecture, and its images go to it as pixels.
    """

    model_config = ConfigDict(validate_default=True)

    id: Annotated[str, AfterValidator(_safe_id)]
    access: Access = "weights"
    api: Api | None = None
    """a prediction service; it takes the place of a file"""
    weights: Annotated[Text, AfterValidator(_inside)] | None = None
    """file inside the pool folder"""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """of that file"""
    arch: Annotated[str, AfterValidator(known_teacher)] | None = None
    input: Input
    mean: list[float] | None = None
    std: list[float] | None = None
    classes: list[Text] = Field(min_length=2, max_length=100_000)
    accuracy: Accuracy = Accuracy()
    source: Text = ""
    authorization: Text = ""

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The terms come last, and what an entry does not say of them is left out."""
        found = handler(self)
        terms = {key: found.pop(key) for key in Terms.model_fields if key in found}
        said = {key: value for key, value in terms.items() if value != Terms.model_fields[key].default}
        return {key: value for key, value in found.items() if key != "api" or value is not None} | said

    @field_validator("api")
    @classmethod
    def _asked_only(cls, value: Api | None, info: ValidationInfo) -> Api | None:
        if value is not None and info.data.get("access") == "weights":
            raise ValueError("a service gives logits, probs or label; access is 'weights'")
        return value

    @field_validator("weights", "sha256", "arch", "mean", "std")
    @classmethod
    def _weights_or_service(cls, value: Any, info: ValidationInfo) -> Any:
        service = info.data.get("api") is not None
        if value is None and not service and "api" in info.data:
            raise ValueError("required where there is no api")
        if value is not None and service:
            raise ValueError("a service has none; leave it out")
        return value

    @model_validator(mode="after")
    def _terms_fit(self) -> Self:
        for name in ("decimals", "top_k"):
            if getattr(self, name) is not None and self.access != "probs":
                raise ValueError(f"{name}: for access 'probs' only; access is {self.access!r}")
        if self.top_k is not None and self.top_k > len(self.classes):
            raise ValueError(f"top_k: there are {len(self.classes)} classes, got {self.top_k}")
        batch = self.api.images if self.api is not None else 1
        if self.budget is not None and self.budget < batch:
            raise ValueError(f"budget: {self.budget} is below one batch of {batch} images; lower api.batch (--batch)")
        price = batch * Decimal(repr(self.price))
        if self.money is not None and Decimal(repr(self.money)) < price:
            raise ValueError(
                f"money: {self.money:g} is below the price of one batch of {batch} images, {price:f}; lower api.batch "
                "(--batch)"
            )
        return self

    @field_validator("mean", "std")
    @classmethod
    def _one_per_channel(cls, value: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if value is None:
            return None
        size = info.data.get("input")
        if size is not None and len(value) != size.channels:
            raise ValueError(
                f"expected {size.channels} values, got {len(value)} - the model takes {size.channels} channels"
            )
        if not all(math.isfinite(number) for number in value):
            raise ValueError(f"expected finite numbers, got {value}")
        if info.field_name == "std" and not all(number > 0 for number in value):
            raise ValueError(f"expected positive numbers, got {value}")
        if any(abs(number) > 1 for number in value):
            right = ", ".join(f"{number / 255:.4g}" for number in value)
            raise ValueError(f"{value} is not of pixels in [0, 1]; if it is of pixels in 0-255, write {right}")
        return value

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        seen: set[str] = set()
        for name in value:
            if not name or name in seen:
                raise ValueError(f"class {name!r} appears twice" if name else "a class name is empty")
            seen.add(name)
        return value

    @property
    def image(self) -> ImageSpec:
        """Size and normalisation of the images; a service normalises them itself."""
        mean, std = self.mean or [0.0] * self.input.channels, self.std or [1.0] * self.input.channels
        return ImageSpec(**self.input.model_dump(), mean=tuple(mean), std=tuple(std))

    @property
    def terms(self) -> Terms:
        """What an answer costs, what may be spent, and how coarse an answer is; nothing else of the entry."""
        return Terms(**{name: getattr(self, name) for name in Terms.model_fields})

    @property
    def card(self) -> TeacherCard:
        """What the rest of the program knows of this teacher.

        The card of a teacher that is only asked has no architecture and no normalisation, wherever the teacher is.
        """
        known = self if self.access == "weights" else self.model_copy(update={"arch": None, "mean": None, "std": None})
        return known.inside

    @property
    def inside(self) -> TeacherCard:
        """The card with all that the pool says, for the shard that runs the teacher's weights."""
        return TeacherCard(
            id=self.id,
            arch=self.arch or "",
            image=self.image,
            classes=tuple(self.classes),
            access=self.access,
            sha256=self.sha256 or "",
            accuracy=self.accuracy.reported,
        )


CHANGEABLE: dict[str, Any] = {
    **dict.fromkeys(("price", "budget", "money"), True),
    "api": {"key_env", "rate", "concurrency", "batch", "timeout", "binary"},
}
"""Fields of an entry that decide no answer."""


class PoolBudget(_Strict):
    """What a run may spend on the teachers of a pool together."""

    queries: int | None = Field(default=None, ge=1)
    """most images sent"""
    money: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class Manifest(_Strict):
    """All that `pool.yaml` says."""

    version: Literal[1]
    budget: PoolBudget | None = None
    teachers: list[Entry] = []


def make_entry(
    id: str,
    arch: str,
    image: ImageSpec,
    classes: Sequence[str],
    accuracy: Mapping[str, float | None] | None,
    source: str,
    authorization: str,
    access: Access = "weights",
    terms: Terms = FREE,
) -> Entry:
    """The entry of a teacher whose file has yet to be written (`sha256` is all zeros). Raises UsageError."""
    fields = {
        "id": id,
        "access": access,
        **terms.model_dump(),
        "weights": "weights/unwritten.safetensors",
        "sha256": "0" * 64,
        "arch": arch,
        "input": {"channels": image.channels, "height": image.height, "width": image.width},
        "mean": [float(number) for number in image.mean],
        "std": [float(number) for number in image.std],
        "classes": list(classes),
        "accuracy": {key: None if value is None else float(value) for key, value in (accuracy or {}).items()},
        "source": source,
        "authorization": authorization,
    }
    entry = checked(fields)
    return entry.model_copy(update={"weights": f"weights/{id}.safetensors"})


def terms_of(fields: Mapping[str, Any]) -> Terms:
    """The terms that `fields` describe. Raises UsageError with the first fault."""
    try:
        return Terms.model_validate(fields)
    except ValidationError as error:
        raise UsageError(_first_fault(error)) from None


def checked(fields: Mapping[str, Any]) -> Entry:
    """The entry that `fields` describe. Raises UsageError with the first fault."""
    try:
        return Entry.model_validate(fields)
    except ValidationError as error:
        raise UsageError(_first_fault(error)) from None


def read_manifest(folder: Path | Uri) -> Manifest:
    """What the manifest of a pool folder says, with the entries in file order.

    Raises UsageError if there is no manifest, and RejectedError with the place of the first fault in it.
    """
    file = folder / MANIFEST
    if not (object_store.exists(file) if isinstance(file, Uri) else file.exists()):
        raise UsageError(f"{folder}: no pool here (no {MANIFEST})")
    try:
        data = weights_file.read_bytes(file, limits=weights_file.Limits(file_bytes=MANIFEST_BYTES))
        content = yaml_text.load(data)
    except RejectedError as error:
        raise RejectedError(f"{MANIFEST}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error) or "nested too deep"
        raise RejectedError(f"{MANIFEST}: {where}not YAML: {problem.splitlines()[0]}") from None
    try:
        found = Manifest.model_validate(content)
    except ValidationError as error:
        raise RejectedError(f"{MANIFEST}: {_first_fault(error)}") from None
    places: dict[str, int] = {}
    for place, entry in enumerate(found.teachers):
        if places.setdefault(entry.id, place) != place:
            raise RejectedError(
                f"{MANIFEST}: teachers[{place}].id: {entry.id!r} is taken by teachers[{places[entry.id]}]"
            )
    return found


def write_manifest(folder: Path, manifest: Manifest) -> bytes:
    """Replace the manifest of a folder in one step. Returns the text that was written.

    What a service leaves at its default is not written.
    """
    content = manifest.model_dump(mode="json", exclude={"teachers"} if manifest.budget else {"teachers", "budget"})
    content["teachers"] = [_fields(entry) for entry in manifest.teachers]
    return _replaced(folder, yaml_text.dump(content).encode())


def append_entry(folder: Path, text: bytes, entry: Entry) -> bytes:
    """Replace the manifest of a folder, whose text `write_manifest` made of some teachers, by one with another teacher.

    The text is that of `write_manifest`, and takes as long as one entry does. Returns it.
    """
    return _replaced(folder, text + yaml_text.dump([_fields(entry)]).encode())


def _fields(entry: Entry) -> dict[str, Any]:
    return entry.model_dump(mode="json", exclude_defaults=entry.api is not None)


def _replaced(folder: Path, text: bytes) -> bytes:
    weights_file.write_bytes(folder / MANIFEST, text)
    return text


def _first_fault(error: ValidationError) -> str:
    """The first complaint of pydantic in one line, such as `teachers[3].mean: expected 3 values, got 1`."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    parts = (part if isinstance(part, int) or part.isprintable() else ascii(part) for part in fault["loc"])
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    got = ascii(fault["input"])
    got = got if len(got) <= 60 else f"{got[:60]}.."
    match fault["type"]:
        case "value_error":
            text = fault["msg"].removeprefix("Value error, ")
        case "missing":
            text = "required"
        case "extra_forbidden":
            text = "unknown key"
        case "string_type":
            text = f"expected text, got {got} - put it in quotes"
        case _:
            text = f"{fault['msg'][0].lower()}{fault['msg'][1:]}, got {got}"
    rest = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{place}: {text}{rest}" if place else f"{text}{rest}"
