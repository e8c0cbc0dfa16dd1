"""The schema of an `api` block in `pool.yaml`: where a prediction service is, and how it is asked."""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts to which plain http is allowed, since nothing leaves this machine."""

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("not an address; expected one such as https://host/path") from None
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise ValueError("not an address; expected one such as https://host/path")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("an address may hold no user, password, query or fragment; name a key with --key-env")
    if parts.scheme == "http" and host not in LOOPBACK:
        raise ValueError(f"http sends images and keys to {host} in clear text; use https, or a tunnel to 127.0.0.1")
    return url.rstrip("/")


def _variable(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError(
            "expected the NAME of an environment variable that holds the key (A-Z, 0-9, _), never the key itself"
        )
    return name


class Api(BaseModel):
    """A prediction service behind HTTP. A key is named by an environment variable and stands in no file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    url: Annotated[str, AfterValidator(_address)]
    """https, or http to this machine"""
    adapter: Literal["oip", "hf-image-classification", "json"]
    """how requests and answers are written"""
    model: str | None = None
    """name of the model at the service"""
    output: str | None = None
    """name of the output that holds the answers"""
    key_env: Annotated[str, AfterValidator(_variable)] | None = None
    """environment variable that holds the key"""
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """most images a second; no limit if null"""
    concurrency: int = Field(default=2, ge=1, le=256)
    """most requests at a time"""
    batch: int = Field(default=250, ge=1, le=100_000)
    """most images in a request"""

    @property
    def options(self) -> dict[str, object]:
        """What decides the answers: all but the key, the limits, and the size of a request."""
        return self.model_dump(mode="json", exclude={"key_env", "rate", "concurrency", "batch"})
