"""What `pool.yaml` says of a teacher that is only asked: how it is reached, what it costs, and what may be spent.

An address may be a stranger's, but a key never stands in the file: an entry names the environment variable that holds
it.
"""

import hashlib
import ipaddress
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ray_dfml.types import ImageSpec, TeacherCard

Adapter = Literal["oip", "hf-image-classification", "json"]
"""Open Inference Protocol v2, the task of Hugging Face endpoints, or a request of the user's own making."""

Binary = Literal["auto", "on", "off"]
"""Whether tensors of `oip` travel as bytes; `auto` tries it on the first image."""

Form = Literal["vector", "label-index", "label-name", "label-score-list"]
"""What an answer of `json` holds for one image."""

PLACEHOLDERS = ("$nested", "$flat", "$png_b64")
"""What stands in the body of `json` where an image goes: nested lists, a flat list, or a PNG in base64."""

KEY = "$KEY"
"""What stands in a header or in a text of the body of `json` where the key goes."""

_ANSWERING = {"url", "adapter", "model", "output", "layout", "mean", "std", "template"}
"""Fields of an Api on which answers depend."""

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")
_SECRET = re.compile(r"auth|key|token|secret|password|signature|\bsig\b|cookie", re.IGNORECASE)
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"not an address: {error}") from None
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise ValueError("expected an address such as https://host:port")
    if parts.username is not None or parts.password is not None:
        raise ValueError("an address holds no user or password; name the variable of the key in key_env")
    if parts.query or parts.fragment:
        raise ValueError("an address holds no '?' or '#'")
    if parts.scheme == "http" and not is_loopback(host):
        raise ValueError(f"http to {host} would send images and key in the open; use https")
    return url.rstrip("/")


def variable(name: str) -> str:
    """The name of an environment variable. Raises ValueError for what may be a key, and does not repeat it."""
    if not _VARIABLE.fullmatch(name):
        raise ValueError(
            "expected the name of an environment variable in capitals, such as API_KEY, and not the key itself"
        )
    return name


def _path(path: str) -> str:
    if path and (not path.startswith("/") or path.startswith("//") or not path.isprintable() or " " in path):
        raise ValueError("expected a path that begins with one '/', such as /v1/models/m:predict")
    if any(_SECRET.search(name) for name, _ in parse_qsl(urlsplit(path).query, keep_blank_values=True)):
        raise ValueError("a path holds no key; name its variable in key_env")
    return path


def _headers(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not _HEADER.fullmatch(name) or not value.isprintable():
            raise ValueError(f"{name!a} is not a header of one line")
        if _SECRET.search(name) and KEY not in value:
            raise ValueError(f"{name}: a key never stands here; write {KEY}, and name its variable in key_env")
    return headers


def _model(name: str) -> str:
    if not all(part and part not in (".", "..") and re.fullmatch(r"[\w.@:+-]+", part) for part in name.split("/")):
        raise ValueError("a model's name has letters, digits, '.', '_', '-', '@', ':', '+', and '/' between parts")
    return name


def places(body: Any) -> Iterator[str]:
    """The placeholders in a body of `json`, in order."""
    yield from (text for _, text in _texts(body) if text in PLACEHOLDERS)


def _texts(body: Any, below: str = "") -> Iterator[tuple[str, str]]:
    """The texts in a body of `json`, in order, each with the name above it that a secret may have, or an empty one."""
    if isinstance(body, str):
        yield below, body
    elif isinstance(body, dict):
        for name, value in body.items():
            yield from _texts(value, name if _SECRET.search(name) else below)
    elif isinstance(body, list):
        for value in body:
            yield from _texts(value, below)


def repeats(body: Any) -> bool:
    """Whether the placeholder of a body stands in a list that holds nothing else, and so can be many."""
    if isinstance(body, list):
        return (len(body) == 1 and any(places(body))) or any(map(repeats, body))
    return isinstance(body, dict) and any(map(repeats, body.values()))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Template(_Strict):
    """The request of adapter `json`, and where its answers are."""

    path: Annotated[str, AfterValidator(_path)] = ""
    """after the url"""
    headers: Annotated[dict[str, str], AfterValidator(_headers)] = {}
    body: dict[str, Any] | list[Any]
    """JSON with one of PLACEHOLDERS; an innermost list that holds nothing else is repeated for each image"""
    answer: str = Field(pattern=r"^([\w-]+|\*)(\.([\w-]+|\*))*$")
    """where the answers are, such as `predictions` or `outputs.*.scores`; `*` is each image of a batch"""
    form: Form
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """factor of the pixels of `$nested` and `$flat`: 255 for a service that takes 0 to 255"""

    @property
    def repeats(self) -> bool:
        """Whether a request can hold several images."""
        return repeats(self.body)

    @property
    def holds_key(self) -> bool:
        """Whether a header or the body says where the key goes."""
        return any(KEY in text for text in self.headers.values()) or self.body_holds_key

    @property
    def body_holds_key(self) -> bool:
        """Whether the body says where the key goes."""
        return any(KEY in text for _, text in _texts(self.body))

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        for name, text in _texts(self.body):
            if name and text and KEY not in text and text not in PLACEHOLDERS:
                raise ValueError(
                    f"body: {name}: a key never stands here; write {KEY}, and name its variable as key_env"
                )
        return self

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        found = list(places(self.body))
        if len(found) != 1:
            raise ValueError(f"body: expected one of {', '.join(PLACEHOLDERS)} once, got {len(found)}")
        return self


class Api(_Strict):
    """How a service is reached."""

    url: Annotated[str, AfterValidator(_address)]
    """https, or http on this machine"""
    adapter: Adapter
    model: Annotated[str, AfterValidator(_model)] | None = None
    """name on the server"""
    output: str | None = None
    """name of the tensor that holds the answers; `oip` chooses by it"""
    input: str | None = None
    """name of the tensor of images; `oip` asks the server if it is null"""
    datatype: Literal["FP32", "UINT8"] | None = None
    """of the tensor of images; `oip` asks the server if it is null"""
    binary: Binary = "auto"
    layout: Literal["nchw", "nhwc"] = "nchw"
    """order of the dimensions of the images that are sent, unless they are PNG"""
    mean: list[float] | None = None
    """per channel, for a service that takes (pixels - mean) / std, pixels in [0, 1]"""
    std: list[float] | None = None
    key_env: Annotated[str, AfterValidator(variable)] | None = None
    """environment variable that holds the key"""
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """most images a second"""
    concurrency: int = Field(default=4, ge=1, le=256)
    """most requests at a time"""
    batch: int = Field(default=250, ge=1, le=65_536)
    """most images in a request, for protocols that take several"""
    timeout: float = Field(default=60.0, gt=0, le=3600, allow_inf_nan=False)
    """seconds until an answer is given up"""
    template: Template | None = None
    """of adapter `json`"""

    @property
    def images(self) -> int:
        """Most images in a request: `batch`, or 1 if the protocol or the template takes no more."""
        one = self.adapter == "hf-image-classification" or (self.template is not None and not self.template.repeats)
        return 1 if one else self.batch

    @model_validator(mode="after")
    def _fits_the_adapter(self) -> Self:
        if (self.mean is None) != (self.std is None) or len(self.mean or []) != len(self.std or []):
            raise ValueError("mean and std go together, a value for each channel")
        if not all(map(math.isfinite, (self.mean or []) + (self.std or []))) or not all(x > 0 for x in self.std or []):
            raise ValueError("expected finite numbers for mean, and positive ones for std")
        if self.mean is not None and (self.datatype == "UINT8" or self.adapter == "hf-image-classification"):
            raise ValueError("images of 8 bits are sent as they are; leave mean and std out")
        if self.adapter == "oip" and not (self.model and self.output):
            raise ValueError("adapter oip needs model and output, the name of the tensor that holds the answers")
        if (self.adapter == "json") != (self.template is not None):
            raise ValueError("adapter json needs a template, and no other adapter takes one")
        if self.template and self.template.holds_key and not self.key_env:
            raise ValueError(f"the template holds {KEY}, and key_env names no variable")
        return self


class Terms(_Strict):
    """What an answer of a teacher costs, what may be spent on it, and how coarse it is."""

    price: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """of one image, in the currency of the bill"""
    budget: int | None = Field(default=None, ge=1)
    """most images that may be sent, repeats included"""
    money: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """most that may be spent"""
    decimals: int | None = Field(default=None, ge=0, le=9)
    """to which probabilities are rounded"""
    top_k: int | None = Field(default=None, ge=1)
    """how many of the largest probabilities are given; the others are 0"""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a pool or a run may spend in all. None is no bound."""

    queries: int | None = None
    """Most images that may be sent."""
    money: float | None = None
    """Most that may be spent, in the currency of the prices."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A teacher that is only asked, as the gateway takes it."""

    card: TeacherCard
    terms: Terms = field(default_factory=Terms)
    api: Api | None = None
    """None for a local model, whose shard computes the answers itself."""
    pool: str = ""
    """Name of the pool whose budget the teacher shares."""
    image: ImageSpec | None = None
    """How a local model normalises images, where its card does not say it."""

    @property
    def identity(self) -> bytes:
        """sha256 of all that an answer depends on but the image; limits, prices and the key's name do not count."""
        api = self.api and self.api.model_dump(include=_ANSWERING)
        image = (self.image or self.card.image).values()
        parts = [self.card.id, self.card.sha256, self.card.access, self.card.classes, image, api]
        text = json.dumps([*parts, self.terms.decimals, self.terms.top_k], sort_keys=True)
        return hashlib.sha256(text.encode()).digest()
