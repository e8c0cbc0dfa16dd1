"""Images to the bytes of a request, and the bytes of an answer to checked numbers, for each protocol.

Whatever a service sends, what comes out of `answers` is float32 [n q] or int64 [n], finite, of the right shape, and, if
the access is `probs`, probabilities; anything else is a BadAnswer.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import orjson
from PIL import Image

from ray_dfml.data.services import PLACEHOLDERS, Api, Asked, places, repeats
from ray_dfml.errors import RejectedError, UsageError, first_of
from ray_dfml.services import protocol
from ray_dfml.services.checks import BadAnswer, Checked, Unreadable, parse_json
from ray_dfml.types import size_text

_JSON = {"Content-Type": "application/json"}


class Request(NamedTuple):
    """A POST: the path after the url, headers without the key, and the body."""

    path: str
    headers: Mapping[str, str]
    body: bytes


class Adapter(Protocol):
    """A protocol of a service."""

    notes: Sequence[str]
    """What was assumed."""

    @property
    def batch(self) -> int:
        """Most images of a request."""
        ...

    def request(self, images: np.ndarray, id: str) -> Request:
        """The request about images [n c h w], uint8 or float32 in [0, 1]. Attempts of a batch share an id."""
        ...

    def answers(self, headers: Mapping[str, str], body: bytes, n: int) -> np.ndarray:
        """The checked answers to `n` images. Raises BadAnswer."""
        ...


def adapter(asked: Asked) -> Adapter:
    """The adapter of a service. Raises UsageError if its access and its images do not fit the protocol."""
    api = asked.api
    if api is None:
        raise ValueError(f"{asked.card.id} is not behind HTTP")
    channels = asked.card.image.channels
    if api.mean is not None and len(api.mean) != channels:
        raise UsageError(f"{asked.card.id}: api.mean has {len(api.mean)} values, the images {channels} channels")
    if api.adapter == "oip":
        return Oip(asked, api)
    if _is_png(api) and channels not in (1, 3):
        raise UsageError(f"{asked.card.id}: a PNG has 1 or 3 channels, the images have {channels}")
    if api.template is None:
        return HuggingFace(asked, api)
    labels = api.template.form in ("label-index", "label-name")
    if api.template.form != "label-score-list" and labels != (asked.card.access == "label"):
        raise UsageError(f"{asked.card.id}: form {api.template.form} does not give access {asked.card.access!r}")
    return Json(asked, api)


def sent_as(asked: Asked, images: np.ndarray) -> np.ndarray:
    """The images as they are hashed: rounded to 8 bits if that is what is sent, else as they are."""
    api = asked.api
    if images.dtype == np.uint8 or api is None or not (_is_png(api) or api.datatype == "UINT8"):
        return images
    return _bytes(images)


def _is_png(api: Api) -> bool:
    return (api.template is None and api.adapter != "oip") or "$png_b64" in places(api.template and api.template.body)


def _bytes(images: np.ndarray) -> np.ndarray:
    return images if images.dtype == np.uint8 else np.rint(images * 255).astype(np.uint8)


def _numbers(api: Api, images: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """float32 images as a service takes them: pixels in [0, 1], normalised, in its order of dimensions."""
    pixels = images.astype(np.float32) / np.float32(255) if images.dtype == np.uint8 else images
    if api.mean is not None:
        mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (api.mean, api.std))
        pixels = (pixels - mean) / std
    return _ordered(api, pixels if scale == 1 else pixels * np.float32(scale))


def _ordered(api: Api, images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images if api.layout == "nchw" else images.transpose(0, 2, 3, 1))


def png_base64(image: np.ndarray) -> str:
    """A PNG in base64 of an image [c h w], uint8 or float32 in [0, 1], of 1 or 3 channels."""
    pixels, file = _bytes(image), io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "png", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


class Oip:
    """Open Inference Protocol v2. `input` and `datatype` must be known when images are sent.

    While it is not known whether the server takes binary tensors, `binary` is None, and they are sent.
    """

    def __init__(self, asked: Asked, api: Api) -> None:
        """What the entry leaves open is set by `describe`, and `binary` by the client, who sees whether they work."""
        self._answers, self._asked, self._api = Checked(asked), asked, api
        self.input = api.input
        self.datatype: Literal["FP32", "UINT8"] | None = api.datatype
        self.binary: bool | None = {"on": True, "off": False, "auto": None}[api.binary]
        self.notes: Sequence[str] = ()

    @property
    def batch(self) -> int:
        """See Adapter."""
        return self._api.images

    @property
    def metadata_path(self) -> str:
        """Where the server describes the model."""
        return f"/v2/models/{self._api.model}"

    def describe(self, body: bytes) -> None:
        """Take the tensors' names and types from the server's metadata. Raises RejectedError if they do not fit."""
        id = self._asked.card.id
        try:
            known = parse_json(body)
        except BadAnswer as error:
            raise RejectedError(f"{id}: the description of the model: {error}") from None
        inputs, outputs = (_tensors(known, part) for part in ("inputs", "outputs"))
        if outputs and self._api.output not in outputs:
            raise RejectedError(f"{id}: the server has no output {self._api.output!r}; it has {first_of([*outputs])}")
        if self.input is None and len(inputs) > 1:
            raise RejectedError(f"{id}: the model has inputs {first_of([*inputs])}; name one as api.input")
        if self.input is None and not inputs:
            self.notes = ("the server names no input; 'input' is used",)
        name = self.input or next(iter(inputs), "input")
        if inputs and name not in inputs:
            raise RejectedError(f"{id}: the model has no input {name!r}; it has {first_of([*inputs])}")
        self.input, described = name, inputs.get(name, {})
        if self.datatype is None:
            datatype = described.get("datatype", "FP32")
            if datatype not in ("FP32", "UINT8"):
                raise RejectedError(f"{id}: the model takes {datatype!a} images; only FP32 and UINT8 are supported")
            if datatype == "UINT8" and self._api.mean is not None:
                raise RejectedError(f"{id}: the model takes images of 8 bits; leave mean and std out")
            self.datatype = "UINT8" if datatype == "UINT8" else "FP32"
        self._check_size(described.get("shape"))

    def _check_size(self, shape: Any) -> None:
        c, h, w = self._asked.card.image.shape
        size = (c, h, w) if self._api.layout == "nchw" else (h, w, c)
        if not isinstance(shape, list) or not all(type(side) is int for side in shape) or not shape:
            return
        tail = shape[-3:]
        if len(shape) not in (3, 4) or any(side not in (-1, own) for side, own in zip(tail, size, strict=True)):
            raise RejectedError(
                f"{self._asked.card.id}: the model takes images of shape {shape}, the entry says {size_text(size)}"
                f" in order {self._api.layout}"
            )

    def request(self, images: np.ndarray, id: str) -> Request:
        """See Adapter."""
        if self.input is None or self.datatype is None:
            raise ValueError("the model is not described")
        pixels = _ordered(self._api, _bytes(images)) if self.datatype == "UINT8" else _numbers(self._api, images)
        output: dict[str, Any] = {"name": self._api.output}
        binary = self.binary is not False
        if binary:
            output["parameters"] = {"binary_data": True}
        tensor = protocol.Tensor(self.input, self.datatype, pixels)
        packed = protocol.pack("inputs", {"id": id, "outputs": [output]}, [tensor], binary=binary)
        headers = dict(_JSON)
        if packed.header_length is not None:
            headers = {
                "Content-Type": "application/octet-stream",
                protocol.HEADER_LENGTH: str(packed.header_length),
            }
        if self.binary is None:  # a server that fails on bytes may close the connection without a word
            headers["Connection"] = "close"
        return Request(f"{self.metadata_path}/infer", headers, packed.body)

    def answers(self, headers: Mapping[str, str], body: bytes, n: int) -> np.ndarray:
        """See Adapter."""
        length = headers.get(protocol.HEADER_LENGTH)
        if length is None:
            parse_json(body)
        elif not length.isdecimal() or len(length) > 12:
            raise BadAnswer(f"answers a header {protocol.HEADER_LENGTH} that is no number")
        try:
            tensors = protocol.unpack("outputs", body, None if length is None else int(length)).tensors
        except protocol.Malformed as error:
            raise Unreadable(f"answers a message that cannot be read: {error}") from None
        found = [tensor.array for tensor in tensors if tensor.name == self._api.output]
        if len(found) != 1:
            names = first_of([ascii(tensor.name) for tensor in tensors])
            raise BadAnswer(f"answers no output {self._api.output!r}, but {names or 'none'}")
        return self._answers.of(found[0], n)


def _tensors(known: Any, part: str) -> dict[str, dict[str, Any]]:
    """Name -> description, of the tensors of a model."""
    listed = known.get(part) if isinstance(known, dict) else None
    listed = listed if isinstance(listed, list) else []
    return {one["name"]: one for one in listed if isinstance(one, dict) and isinstance(one.get("name"), str)}


class HuggingFace:
    """The task image-classification of Hugging Face's endpoints: a PNG, and labels with scores."""

    batch = 1
    notes: Sequence[str] = ()

    def __init__(self, asked: Asked, api: Api) -> None:
        """A `model` goes into the path; without one, the url is the whole address."""
        card = asked.card
        self._answers = Checked(asked)
        self._path = f"/models/{api.model}" if api.model else ""
        count = 1 if card.access == "label" else asked.terms.top_k or len(card.classes)
        self._parameters: dict[str, Any] = {"top_k": count}
        if card.access != "label":
            self._parameters["function_to_apply"] = "softmax" if card.access == "probs" else "none"

    def request(self, images: np.ndarray, id: str) -> Request:
        """See Adapter."""
        body = {"inputs": png_base64(images[0]), "parameters": self._parameters}
        return Request(self._path, _JSON, orjson.dumps(body))

    def answers(self, headers: Mapping[str, str], body: bytes, n: int) -> np.ndarray:
        """See Adapter."""
        return self._answers.scores([parse_json(body)], n)


class Json:
    """A request and an answer that the entry's template describes."""

    notes: Sequence[str] = ()

    def __init__(self, asked: Asked, api: Api) -> None:
        """The template's body is filled anew for each request."""
        assert api.template is not None
        self._answers, self._api, self._template = Checked(asked), api, api.template
        self._placeholder = next(places(api.template.body))

    @property
    def batch(self) -> int:
        """See Adapter."""
        return self._api.images

    def request(self, images: np.ndarray, id: str) -> Request:
        """See Adapter."""
        if self._placeholder == "$png_b64":
            values: Sequence[Any] = [png_base64(image) for image in images]
        else:
            numbers = _numbers(self._api, images, self._template.scale)
            values = list(numbers.reshape(len(numbers), -1) if self._placeholder == "$flat" else numbers)
        body = orjson.dumps(_filled(self._template.body, values), option=orjson.OPT_SERIALIZE_NUMPY)
        return Request(self._template.path, _JSON | self._template.headers, body)

    def answers(self, headers: Mapping[str, str], body: bytes, n: int) -> np.ndarray:
        """See Adapter."""
        found = _at(parse_json(body), self._template.answer.split("."))
        if not self._template.repeats:
            found = [found]
        if self._template.form == "label-score-list":
            return self._answers.scores(found, n)
        if not isinstance(found, list):
            raise BadAnswer(f"answers no list at {self._template.answer}")
        return self._answers.of(found, n)


def _filled(body: Any, values: Sequence[Any]) -> Any:
    """The body with images in place of the placeholder; the innermost list that holds nothing else is repeated."""
    if isinstance(body, str):
        return values[0] if body in PLACEHOLDERS else body
    if isinstance(body, dict):
        return {key: _filled(value, values) for key, value in body.items()}
    if not isinstance(body, list):
        return body
    if len(body) == 1 and any(places(body)) and not repeats(body[0]):
        return [_filled(body[0], [value]) for value in values]
    return [_filled(part, values) for part in body]


def _at(data: Any, parts: Sequence[str]) -> Any:
    """What a dotted path leads to; `*` stands for each element of a list."""
    for place, part in enumerate(parts):
        if part == "*" and isinstance(data, list):
            return [_at(item, parts[place + 1 :]) for item in data]
        if isinstance(data, list) and part.isdecimal() and int(part) < len(data):
            data = data[int(part)]
        elif isinstance(data, dict) and part in data:
            data = data[part]
        else:
            raise BadAnswer(f"answers nothing at {'.'.join(parts[: place + 1])}")
    return data
