"""Messages of the Open Inference Protocol: what is packed is read back to the bit, and what is wrong is named."""

import json
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ray_dfml.services.protocol import DATATYPES, Malformed, Message, Tensor, pack, unpack
from tests.support import PROPERTY

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any datatype with finite numbers."""
    datatype = draw(st.sampled_from(list(DATATYPES)))
    dtype = np.dtype(DATATYPES[datatype])
    elements: Any = None
    if dtype.kind == "f":
        elements = st.floats(allow_nan=False, allow_infinity=False, width=8 * dtype.itemsize)  # pyright: ignore
    return Tensor(draw(st.text(max_size=5)), datatype, draw(hnp.arrays(dtype, SHAPES, elements=elements)))


@given(st.lists(tensors(), max_size=3), st.booleans())
@PROPERTY
def test_what_is_packed_is_read_back_to_the_bit(given: list[Tensor], binary: bool) -> None:
    head = {"id": "7", "parameters": {"a": 1}}
    body, header_length = pack("outputs", head, given, binary=binary)
    assert (header_length is None) == (not binary)
    found = unpack("outputs", body, header_length)
    assert found.head == head
    assert [(t.name, t.datatype, t.array.shape) for t in found.tensors] == [
        (t.name, t.datatype, t.array.shape) for t in given
    ]
    for one, other in zip(found.tensors, given, strict=True):
        assert one.array.dtype == other.array.dtype
        if binary:
            assert one.array.tobytes() == other.array.tobytes()
        np.testing.assert_array_equal(one.array, other.array)


def test_float32_numbers_keep_their_bits_in_json() -> None:
    values = np.random.default_rng(0).random(100_000, np.float32)
    (found,) = unpack("inputs", pack("inputs", {}, [Tensor("x", "FP32", values)]).body).tensors
    assert found.array.tobytes() == values.tobytes()


def test_json_that_holds_no_nan_is_not_written() -> None:
    bad = Tensor("x", "FP32", np.array([np.nan], np.float32))
    with pytest.raises(ValueError, match="x: JSON cannot hold NaN"):
        pack("inputs", {}, [bad])
    (found,) = unpack("inputs", *pack("inputs", {}, [bad], binary=True)).tensors
    assert np.isnan(found.array).all()


def message(**changes: Any) -> bytes:
    """A request of one tensor with some of its fields changed; None takes a field away."""
    form = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [0.5, 1, 0, 1]} | changes
    return json.dumps({"inputs": [{key: value for key, value in form.items() if value is not None}]}).encode()


def test_data_may_be_nested() -> None:
    assert unpack("inputs", message(data=[[0.5, 1], [0, 1]])).tensors[0].array.tolist() == [[0.5, 1], [0, 1]]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b'{"inputs": [', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"<html>busy</html>", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[]", "a list of inputs"),
        (b'{"outputs": []}', "a list of inputs"),
        (b'{"inputs": [1]}', "no.* object with a name"),
        (message(name=3), "no.* object with a name"),
        (message(datatype="FP31"), "datatype 'FP31'; known: BOOL"),
        (message(datatype=["FP32"]), "datatype"),
        (message(shape=[2, -2]), "a shape is a list of sizes"),
        (message(shape=[2.0, 2.0]), "a shape is a list of sizes"),
        (message(shape=[True, 4]), "a shape is a list of sizes"),
        (message(shape="4"), "a shape is a list of sizes"),
        (message(shape=[1] * 17), "a shape is a list of sizes"),
        (message(shape=[2, 3]), "4 values"),
        (message(shape=[2**39, 2**39]), "4 values"),
        (message(shape=[4, 1], data=[[0.5, 1], [0, 1]]), r"shape \[4, 1\] and 4 values of shape \[2, 2\]"),
        (message(data=None), "no list of data"),
        (message(data="0.5"), "no list of data"),
        (message(data=[0.5, 1, 0, None]), "not all numbers of FP32"),
        (message(data=["0.5", "1", "0", "1"]), "not all numbers of FP32"),
        (message(data=[0.5, 1, 0, {}]), "not all numbers of FP32"),
        (message(data=[[0.5, 1], [0]]), "rows of equal length"),
        (message(data=[1e39, 1, 0, 1]), "numbers beyond FP32"),
        (message(datatype="UINT8", data=[256, 1, 0, 1]), "numbers beyond UINT8"),
        (message(datatype="UINT8", data=[-1, 1, 0, 1]), "numbers beyond UINT8"),
        (message(datatype="INT64", data=[0.5, 1, 0, 1]), "not all numbers of INT64"),
        (message(datatype="INT64", data=[2**70, 1, 0, 1]), "not all numbers of INT64"),
        (message(datatype="BOOL"), "not all numbers of BOOL"),
        (message(datatype="BYTES"), "not all texts"),
        (message(parameters={"binary_data_size": 16}), "0 bytes are left"),
        (message(parameters={"binary_data_size": -1}), "binary_data_size -1"),
        (message() + b"1234", "not JSON"),
    ],
)
def test_a_malformed_body_is_named_in_one_line(body: bytes, said: str) -> None:
    with pytest.raises(Malformed, match=said) as found:
        unpack("inputs", body)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("size", "rest", "length", "said"),
    [
        (16, b"x" * 15, None, "binary_data_size 16, and 15 bytes are left"),
        (16, b"x" * 17, None, "1 bytes follow the last tensor"),
        (15, b"x" * 15, None, "no whole number of FP32"),
        (12, b"x" * 12, None, "3 values"),
        (16, b"x" * 16, -1, "is -1, and the body has"),
        (16, b"x" * 16, 10**6, "is 1000000, and the body has"),
        (16, b"x" * 16, 5, "not JSON"),
    ],
)
def test_malformed_bytes_are_named(size: int, rest: bytes, length: int | None, said: str) -> None:
    head = message(data=None, parameters={"binary_data_size": size})
    with pytest.raises(Malformed, match=said):
        unpack("inputs", head + rest, len(head) if length is None else length)


def test_long_texts_in_place_of_numbers_take_no_memory() -> None:
    """NumPy would make all of a million elements as long as the longest one: 400 GB."""
    data = [["x" * 100_000], *[["y"]] * 999_999]
    form = {"name": "y", "shape": [len(data), 1], "datatype": "FP32", "data": data}
    with pytest.raises(Malformed, match="its data are not all numbers of FP32"):
        unpack("outputs", orjson.dumps({"outputs": [form]}))


def test_texts_are_read() -> None:
    form = {"name": "y", "shape": [2, 1], "datatype": "BYTES", "data": ["owl", "jay"]}
    wanted = np.array([[b"owl"], [b"jay"]], object)

    def read(body: bytes, length: int | None = None) -> Message:
        return unpack("outputs", body, length)

    (found,) = read(json.dumps({"outputs": [form]}).encode()).tensors
    np.testing.assert_array_equal(found.array, wanted)
    (found,) = read(json.dumps({"outputs": [{**form, "data": [["owl"], ["jay"]]}]}).encode()).tensors
    np.testing.assert_array_equal(found.array, wanted)
    blob = b"".join(struct.pack("<I", 3) + text for text in (b"owl", b"jay"))
    head = json.dumps({"outputs": [{**form, "data": None, "parameters": {"binary_data_size": len(blob)}}]}).encode()
    (found,) = read(head + blob, len(head)).tensors
    np.testing.assert_array_equal(found.array, wanted)
    with pytest.raises(Malformed, match="a text is cut"):
        read(head.replace(b"14", b"13") + blob[:-1], len(head))
