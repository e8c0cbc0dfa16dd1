"""Messages of the Open Inference Protocol v2, as JSON alone or as JSON followed by the bytes of its tensors.

Clients and servers use the same two functions: `pack` makes the body of a message, `unpack` reads one. Nothing that is
read is trusted: shapes, types, sizes and numbers are checked, and a fault is named in one line.
"""

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header of a message with binary tensors: how many bytes of the body are JSON."""

DATATYPES: Mapping[str, str] = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
"""Datatype of the protocol -> NumPy's. `BYTES`, for texts, is read too, and its array holds `bytes` objects."""

MOST_DIMENSIONS = 16
"""Dimensions of the largest shape that is read."""

Part = Literal["inputs", "outputs"]
"""Where a message has its tensors: a request has inputs, an answer has outputs."""


class Malformed(ValueError):
    """A body is no message of the protocol. The text is one line."""


class Tensor(NamedTuple):
    """A named tensor of a message."""

    name: str
    datatype: str
    array: np.ndarray


class Packed(NamedTuple):
    """The body of a message, and how many bytes of it are JSON; None if all are."""

    body: bytes
    header_length: int | None


class Message(NamedTuple):
    """What a body holds: its JSON object without the tensors, and the tensors in order."""

    head: dict[str, Any]
    tensors: list[Tensor]


def pack(part: Part, head: Mapping[str, Any], tensors: Sequence[Tensor], *, binary: bool = False) -> Packed:
    """The body of a message. With `binary` the tensors follow the JSON as bytes, else they are in it.

    Raises ValueError for numbers that are not finite, which JSON cannot hold. `BYTES` is not written.
    """
    described: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.array, np.dtype(DATATYPES[tensor.datatype]))
        form: dict[str, Any] = {"name": tensor.name, "shape": list(array.shape), "datatype": tensor.datatype}
        if binary:
            blobs.append(array.tobytes())
            form["parameters"] = {"binary_data_size": len(blobs[-1])}
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{tensor.name}: JSON cannot hold NaN or infinity")
        else:
            form["data"] = array.reshape(-1)
        described.append(form)
    text = orjson.dumps({**head, part: described}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Packed(b"".join([text, *blobs]), len(text) if binary else None)


def unpack(part: Part, body: bytes, header_length: int | None = None) -> Message:
    """Read the body of a message; `header_length` is the value of the header HEADER_LENGTH, if there was one.

    Raises Malformed. Numbers in JSON are finite; those in binary tensors may be anything.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise Malformed(f"{HEADER_LENGTH} is {header_length}, and the body has {len(body)} bytes")
    try:
        head = orjson.loads(memoryview(body)[:header_length])
    except orjson.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error}") from None
    if not isinstance(head, dict) or not isinstance(head.get(part), list):
        raise Malformed(f"expected a JSON object with a list of {part}")
    rest = memoryview(body)[len(body) if header_length is None else header_length :]
    tensors = []
    for form in head.pop(part):
        tensor, rest = _tensor(form, rest)
        tensors.append(tensor)
    if len(rest):
        raise Malformed(f"{len(rest)} bytes follow the last tensor")
    return Message(head, tensors)


def _tensor(form: Any, rest: memoryview) -> tuple[Tensor, memoryview]:
    """The tensor that a JSON object describes, and the bytes behind it."""
    if not isinstance(form, dict) or not isinstance(form.get("name"), str):
        raise Malformed("a tensor is not an object with a name")
    name, datatype, shape = form["name"], form.get("datatype"), form.get("shape")
    where = f"tensor {name[:60]!a}"
    if not (isinstance(datatype, str) and (datatype in DATATYPES or datatype == "BYTES")):
        raise Malformed(f"{where}: datatype {str(datatype)[:20]!a}; known: {', '.join(DATATYPES)}, BYTES")
    if not (isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS and all(map(_is_size, shape))):
        raise Malformed(f"{where}: a shape is a list of sizes")
    parameters = form.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        array = _from_json(form.get("data"), datatype, where)
    elif not _is_size(size) or size > len(rest):
        raise Malformed(f"{where}: binary_data_size {str(size)[:20]}, and {len(rest)} bytes are left")
    else:
        array, rest = _from_bytes(rest[:size], datatype, where), rest[size:]
    if array.size != math.prod(shape) or (array.ndim > 1 and list(array.shape) != shape):
        raise Malformed(f"{where}: shape {shape} and {array.size} values of shape {list(array.shape)}")
    return Tensor(name, datatype, array.reshape(shape)), rest


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**40


def kinds(data: list[Any]) -> set[type]:
    """The types of what a list and the lists in it hold. It is cheap, however long the texts in them are."""
    found: set[type] = set()
    while data:
        here = set(map(type, data))
        found |= here - {list}
        data = list(itertools.chain.from_iterable(item for item in data if type(item) is list)) if list in here else []
    return found


def _from_json(data: object, datatype: str, where: str) -> np.ndarray:
    """An array of a flat or nested list."""
    if not isinstance(data, list):
        raise Malformed(f"{where}: no list of data, and no binary_data_size")
    if datatype == "BYTES":
        return _texts(data, where)
    if not kinds(data) <= {bool, int, float}:  # NumPy would make every element as long as the longest text
        raise Malformed(f"{where}: its data are not all numbers of {datatype}")
    try:
        found = np.array(data) if data else np.zeros(0)
    except (ValueError, OverflowError):
        raise Malformed(f"{where}: its data are no rows of equal length") from None
    wanted = np.dtype(DATATYPES[datatype])
    if found.size == 0:
        return found.astype(wanted)
    if found.dtype.kind not in {"f": "iuf", "b": "b"}.get(wanted.kind, "iu"):
        raise Malformed(f"{where}: its data are not all numbers of {datatype}")
    if wanted.kind in "iu":
        limits = np.iinfo(wanted)
        if int(found.min()) < limits.min or int(found.max()) > limits.max:
            raise Malformed(f"{where}: numbers beyond {datatype}")
    with np.errstate(over="ignore"):
        array = found.astype(wanted)
    if wanted.kind == "f" and not np.isfinite(array).all():
        raise Malformed(f"{where}: numbers beyond {datatype}")
    return array


def _texts(data: list[Any], where: str) -> np.ndarray:
    flat: list[Any] = data
    while flat and all(isinstance(item, list) for item in flat):
        flat = [item for row in flat for item in row]
    if not all(isinstance(item, str) for item in flat):
        raise Malformed(f"{where}: its data are not all texts")
    array = np.empty(len(flat), object)
    array[:] = [item.encode() for item in flat]
    return array


def _from_bytes(blob: memoryview, datatype: str, where: str) -> np.ndarray:
    """An array of the bytes of a binary tensor; a text is its length in four bytes, and its letters."""
    if datatype != "BYTES":
        wanted = np.dtype(DATATYPES[datatype])
        if len(blob) % wanted.itemsize:
            raise Malformed(f"{where}: {len(blob)} bytes are no whole number of {datatype}")
        return np.frombuffer(blob, wanted)
    texts: list[bytes] = []
    while len(blob):
        length = struct.unpack_from("<I", blob)[0] if len(blob) >= 4 else len(blob)
        if 4 + length > len(blob):
            raise Malformed(f"{where}: a text is cut")
        texts.append(bytes(blob[4 : 4 + length]))
        blob = blob[4 + length :]
    array = np.empty(len(texts), object)
    array[:] = texts
    return array
