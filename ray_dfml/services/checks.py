"""What a service answers is checked before it is believed.

Answers are finite, of the right shape, within the classes, and, if the access is `probs`, probabilities. Their sum may
miss 1 by 1e-3 and by what rounding to the entry's decimals does; of those cut to `top_k` it is at most 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from ray_dfml.data.services import Asked
from ray_dfml.errors import first_of
from ray_dfml.services.protocol import kinds
from ray_dfml.types import size_text


class BadAnswer(Exception):
    """An answer that cannot be used. The message is one line and has nothing of the request in it."""


class Unreadable(BadAnswer):
    """An answer that is no message of the protocol at all."""


def parse_json(body: bytes) -> Any:
    """The content of a JSON text. Raises Unreadable, which says what there is in its place."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        start = body[:200].lstrip().lower()
        if start.startswith((b"<!doctype", b"<html")):
            raise Unreadable("answers a web page instead of JSON") from None
        raise Unreadable(
            f"answers {len(body)} bytes that are not JSON, or cut short" if body else "answers nothing"
        ) from None


@dataclass(frozen=True)
class Checked:
    """Checks of what a service answers."""

    asked: Asked

    def of(self, values: Any, n: int) -> np.ndarray:
        """The answers in an array or in nested lists: vectors, or labels if the access is `label`."""
        if isinstance(values, list):
            try:
                # NumPy would make every element as long as the longest text
                values = np.array(values, object if str in kinds(values) else None)
            except (ValueError, OverflowError):
                raise BadAnswer("answers rows of different lengths") from None
        return self.labels(values, n) if self.asked.card.access == "label" else self.vectors(values, n)

    def labels(self, values: Any, n: int) -> np.ndarray:
        """int64 [n], from indices [n] or [n 1] or from names of classes."""
        if not isinstance(values, np.ndarray) or values.shape not in ((n,), (n, 1)):
            raise BadAnswer(f"answers {_shape(values)}, expected a label for each of {n} images")
        flat = values.reshape(-1)
        if flat.dtype.kind in "OUS":
            return np.array([self.index(name) for name in flat.tolist()], np.int64)
        if flat.dtype.kind not in "iu":
            raise BadAnswer(f"answers labels of type {flat.dtype}, expected whole numbers or names")
        classes = len(self.asked.card.classes)
        if flat.min() < 0 or flat.max() >= classes:
            raise BadAnswer(f"answers labels from {flat.min()} to {flat.max()}, and there are {classes} classes")
        return flat.astype(np.int64)

    def index(self, name: Any) -> int:
        """The index of a class by its name, or by the part of it behind the data set's."""
        text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        classes = self.asked.card.classes
        found = [i for i, known in enumerate(classes) if known == text]
        found = found or [i for i, known in enumerate(classes) if known.rpartition("/")[2] == text]
        if len(found) != 1:
            raise BadAnswer(f"answers class {text[:60]!a}, which is not one of {first_of(list(classes))}")
        return found[0]

    def vectors(self, values: Any, n: int) -> np.ndarray:
        """float32 [n q]: finite, and probabilities if the access is `probs`."""
        classes = len(self.asked.card.classes)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
            kind = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
            raise BadAnswer(f"answers {kind}, expected numbers (none null) for {classes} classes")
        if values.shape != (n, classes):
            raise BadAnswer(f"answers {_shape(values)}, expected {n}x{classes}: {n} images and {classes} classes")
        with np.errstate(over="ignore"):
            found = values.astype(np.float32)
        if not np.isfinite(found).all():
            raise BadAnswer("answers NaN or infinite numbers")
        if self.asked.card.access == "probs":
            self._check_probabilities(found)
        return found

    def _check_probabilities(self, found: np.ndarray) -> None:
        terms, sums = self.asked.terms, found.sum(1, dtype=np.float64)
        slack = 1e-3 + (0 if terms.decimals is None else found.shape[1] * 0.5 * 10.0**-terms.decimals)
        if found.min() < -1e-3 or found.max() > 1 + 1e-3:
            raise BadAnswer(f"answers numbers from {found.min():g} to {found.max():g}, which are not probabilities")
        if sums.max() > 1 + slack or (terms.top_k is None and sums.min() < 1 - slack):
            worst = sums[np.abs(sums - 1).argmax()]
            raise BadAnswer(f"answers probabilities that sum to {worst:g}; rounded ones need decimals, cut ones top_k")
        if terms.top_k is not None and (found > 0).sum(1).max() > terms.top_k:
            raise BadAnswer(f"answers more than top_k = {terms.top_k} probabilities")

    def scores(self, rows: Any, n: int) -> np.ndarray:
        """The answers in lists of `{"label", "score"}`, one list for each of `n` images."""
        if not isinstance(rows, list) or len(rows) != n:
            raise BadAnswer(f"answers no list of labels and scores for each of {n} images")
        card = self.asked.card
        found = np.full((n, len(card.classes)), -np.inf)
        for row, pairs in zip(found, rows, strict=True):
            if not isinstance(pairs, list) or not pairs or not all(map(_is_score, pairs)):
                raise BadAnswer("answers no list of labels with scores")
            for pair in pairs:
                index = self.index(pair["label"])
                if row[index] != -np.inf:
                    raise BadAnswer(f"answers class {card.classes[index]!a} twice")
                row[index] = pair["score"]
        if card.access == "label":
            return found.argmax(1)
        if card.access == "probs" and self.asked.terms.top_k is not None:
            return self.vectors(np.maximum(found, 0), n)
        if np.isneginf(found).any():
            raise BadAnswer(f"answers {np.isfinite(found).sum(1).min()} of {len(card.classes)} classes; say top_k")
        return self.vectors(found, n)


def _is_score(pair: Any) -> bool:
    """Whether a value is a label with a finite score; JSON has no other numbers, but larger ones than float32."""
    return isinstance(pair, dict) and isinstance(pair.get("label"), str) and type(pair.get("score")) in (int, float)


def _shape(values: Any) -> str:
    if not isinstance(values, np.ndarray):
        return type(values).__name__
    return f"shape {size_text(values.shape)}" if values.ndim else "one value"
