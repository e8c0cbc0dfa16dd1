"""Keys of services: read from the environment when they are needed, and hidden where a server repeats them."""

import os
from collections.abc import Iterable

from ray_dfml.data.services import Asked
from ray_dfml.errors import UsageError

LEAST_KEY = 6
"""Characters of the shortest key that is hidden where a server repeats it; shorter ones are no secret."""


def key_of(asked: Asked) -> str | None:
    """The key of a service; None if it takes none. Raises UsageError, which names the variable, if it is missing."""
    name = asked.api.key_env if asked.api else None
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        fault = "holds spaces at its ends, a line break, or no ASCII" if key else "is not set"
        raise UsageError(f"{asked.card.id}: the environment variable {name} {fault}; it must hold the key")
    return key


def missing_keys(asked: Iterable[Asked]) -> list[str]:
    """A line for each service whose key is not in the environment."""
    lines = []
    for one in asked:
        try:
            key_of(one)
        except UsageError as error:
            lines.append(str(error))
    return lines


def starred(body: bytes, asked: Asked) -> bytes:
    """What a server answers, in which its key has become as many stars.

    So nothing that is made of the answer holds the key, such as a name that is cut, or the name of a tensor. A key of
    LEAST_KEY bytes stands in an answer by no accident, unless it is all digits: probabilities have many of these, so
    such a key is left to `hidden`.
    """
    key = (key_of(asked) or "").encode()
    return body.replace(key, b"*" * len(key)) if len(key) >= LEAST_KEY and not key.isdigit() else body


def hidden(text: str, asked: Asked) -> str:
    """A text without the key of a service, as it is, escaped, or as stars."""
    key = os.environ.get(asked.api.key_env or "", "") if asked.api else ""
    for form in (key, ascii(key)[1:-1], "*" * len(key)) if len(key) >= LEAST_KEY else ():
        text = text.replace(form, "[key]")
    return text
