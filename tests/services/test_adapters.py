"""Images to requests and answers to numbers, for each protocol, and what is refused of a service's answers."""

import base64
import io
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ray_dfml.core.answers import answers as rounded
from ray_dfml.data.services import Api, Asked, Template, Terms
from ray_dfml.errors import UsageError
from ray_dfml.services import protocol
from ray_dfml.services.adapters import adapter, sent_as
from ray_dfml.services.checks import BadAnswer, Checked
from ray_dfml.types import Access, TeacherCard
from tests.support import PROPERTY, image_spec, normal

CLASSES = ("pets/cat", "pets/dog", "wild/fox")


def asked(
    access: Access = "probs", *, channels: int = 3, terms: Terms | None = None, classes: tuple[str, ...] = CLASSES,
    **api: Any,
) -> Asked:  # fmt: skip
    options: dict[str, Any] = {"url": "https://host", "adapter": "oip", "model": "m", "output": "out"} | api
    card = TeacherCard(id="t", arch="", image=image_spec(channels, 4), classes=classes, access=access)
    return Asked(card=card, terms=terms or Terms(), api=Api(**options))


def by_template(access: Access = "probs", **template: Any) -> Asked:
    fields: dict[str, Any] = {"body": {"instances": ["$nested"]}, "answer": "predictions", "form": "vector"} | template
    return asked(access, adapter="json", model=None, output=None, template=Template(**fields))


def pixels(n: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, channels, 4, 4), np.uint8)


def png(text: str) -> np.ndarray:
    array = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


PROBS = [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("binary", ["on", "off"])
def test_oip_sends_what_the_entry_says(binary: Any) -> None:
    images = pixels(2)
    one = asked(binary=binary, input="x", datatype="FP32", layout="nhwc", mean=[0.5, 0.0, 0.25], std=[0.5, 1.0, 2.0])
    request = adapter(one).request(images, "batch-1")
    assert request.path == "/v2/models/m/infer"
    length = request.headers.get(protocol.HEADER_LENGTH)
    assert (length is not None) == (binary == "on")
    assert request.headers["Content-Type"] == ("application/octet-stream" if length else "application/json")
    message = protocol.unpack("inputs", request.body, length and int(length))
    tensor = message.tensors[0]
    wanted = (images / 255 - np.array([0.5, 0.0, 0.25])[:, None, None]) / np.array([0.5, 1.0, 2.0])[:, None, None]
    assert (tensor.name, tensor.datatype, message.head["id"]) == ("x", "FP32", "batch-1")
    np.testing.assert_allclose(tensor.array, wanted.transpose(0, 2, 3, 1), rtol=0, atol=1e-6)
    assert message.head["outputs"][0]["name"] == "out"


def test_oip_sends_pixels_of_bytes_and_of_floats_alike() -> None:
    images = pixels(2)
    one = adapter(asked(input="x", datatype="FP32"))
    floats = images.astype(np.float32) / np.float32(255)
    assert one.request(images, "a").body == one.request(floats, "a").body


@pytest.mark.parametrize("datatype", ["INT64", "INT32", "BYTES"])
@pytest.mark.parametrize("column", [False, True])
def test_oip_reads_labels_by_index_or_by_name(datatype: str, column: bool) -> None:
    data: list[Any] = ["dog", "pets/cat"] if datatype == "BYTES" else [1, 0]
    shape = [2, 1] if column else [2]
    body = {"outputs": [{"name": "other", "datatype": "INT64", "shape": [1], "data": [7]},
                        {"name": "out", "datatype": datatype, "shape": shape, "data": data}]}  # fmt: skip
    found = adapter(asked("label")).answers({}, orjson.dumps(body), 2)
    assert found.tolist() == [1, 0]
    assert found.dtype == np.int64


def test_hugging_face_sends_a_png_and_reads_scores_in_any_order() -> None:
    image = pixels(1)
    one = adapter(asked(adapter="hf-image-classification", output=None, model="org/resnet"))
    request = one.request(image, "a")
    body = orjson.loads(request.body)
    assert request.path == "/models/org/resnet"
    assert body["parameters"] == {"top_k": 3, "function_to_apply": "softmax"}
    assert np.array_equal(png(body["inputs"]), image[0])
    scores = [{"label": "fox", "score": 0.25}, {"label": "cat", "score": 0.5}, {"label": "dog", "score": 0.25}]
    assert one.answers({}, orjson.dumps(scores), 1).tolist() == [PROBS[0]]
    assert one.batch == 1


def test_scores_cut_to_top_k_are_zero_elsewhere_and_labels_are_the_best() -> None:
    scores = orjson.dumps([{"label": "fox", "score": 0.25}, {"label": "cat", "score": 0.5}])
    hf: dict[str, Any] = {"adapter": "hf-image-classification", "output": None, "model": None}
    cut = adapter(asked(terms=Terms(top_k=2), **hf))
    assert cut.answers({}, scores, 1).tolist() == [[0.5, 0, 0.25]]
    assert adapter(asked("label", **hf)).answers({}, scores, 1).tolist() == [0]
    with pytest.raises(BadAnswer, match="answers 2 of 3 classes; say top_k"):
        adapter(asked(**hf)).answers({}, scores, 1)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"instances": ["$nested"]}, lambda x: {"instances": x.tolist()}),
        ({"x": [{"image": "$flat", "n": 1}]}, lambda x: {"x": [{"image": i.ravel().tolist(), "n": 1} for i in x]}),
        (["$nested"], lambda x: x.tolist()),
        ({"a": [1, {"b": ["$nested"]}]}, lambda x: {"a": [1, {"b": x.tolist()}]}),
    ],
)
def test_a_template_is_repeated_for_each_image(body: Any, wanted: Any) -> None:
    images = pixels(2).astype(np.float32) / np.float32(256)  # numbers that JSON writes without rounding
    one = adapter(by_template(body=body, path="/v1/m:predict"))
    assert orjson.loads(one.request(images, "a").body) == wanted(images)
    assert one.batch == 250


def test_a_template_without_a_list_takes_one_image_and_scales_it() -> None:
    one = adapter(by_template(body={"image": "$nested", "to": {"top": 3}}, scale=255.0, answer="out.scores"))
    assert one.batch == 1
    image = pixels(1)
    sent = orjson.loads(one.request(image, "a").body)
    np.testing.assert_allclose(np.array(sent["image"]), image[0], rtol=0, atol=1e-4)
    assert sent["to"] == {"top": 3}
    assert one.answers({}, orjson.dumps({"out": {"scores": PROBS[0]}}), 1).tolist() == [PROBS[0]]


def test_a_template_of_pngs() -> None:
    images = pixels(2)
    one = by_template(body={"instances": [{"b64": "$png_b64"}]})
    floats = images.astype(np.float32) / np.float32(255) + np.float32(0.001)
    rounded_first = sent_as(one, np.clip(floats, 0, 1))
    assert rounded_first.dtype == np.uint8
    sent = orjson.loads(adapter(one).request(rounded_first, "a").body)["instances"]
    assert all(np.array_equal(png(instance["b64"]), image) for instance, image in zip(sent, images, strict=True))


@pytest.mark.parametrize(
    ("template", "access", "body", "wanted"),
    [
        ({}, "probs", {"predictions": PROBS}, PROBS),
        ({"answer": "a.*.p"}, "probs", {"a": [{"p": row} for row in PROBS]}, PROBS),
        ({"answer": "a.0"}, "logits", {"a": [PROBS]}, PROBS),
        ({"form": "label-index"}, "label", {"predictions": [2, 0]}, [2, 0]),
        ({"form": "label-name"}, "label", {"predictions": ["fox", "cat"]}, [2, 0]),
        (
            {"form": "label-score-list"}, "label",
            {"predictions": [[{"label": "dog", "score": 0.9}], [{"label": "cat", "score": 0.4}]]}, [1, 0],
        ),
    ],
)  # fmt: skip
def test_a_template_says_where_the_answers_are(
    template: dict[str, Any], access: Access, body: Any, wanted: Any
) -> None:
    assert adapter(by_template(access, **template)).answers({}, orjson.dumps(body), 2).tolist() == wanted


@pytest.mark.parametrize(
    ("template", "access", "body", "says"),
    [
        ({}, "probs", b'{"predictions": [[0.5, 0.5', "that are not JSON, or cut short"),
        ({}, "probs", b"", "answers nothing"),
        ({}, "probs", b"  <!DOCTYPE html>", "answers a web page instead of JSON"),
        ({}, "probs", b'{"predictions": [[NaN, 1, 0]]}', "not JSON"),
        ({}, "probs", b'{"predictions": [[null, 1, 0]]}', "expected numbers (none null)"),
        ({}, "probs", b'{"predictions": [["1", "0", "0"]]}', "expected numbers"),
        ({}, "probs", b'{"predictions": [[true, false, false]]}', "answers bool"),
        ({}, "probs", b'{"predictions": [[1e300, 0, 0]]}', "NaN or infinite"),
        ({}, "probs", b'{"predictions": [[1, 0, 0], [1, 0]]}', "rows of different lengths"),
        ({}, "probs", b'{"predictions": [[1, 0, 0], [1, 0, 0]]}', "answers shape 2x3, expected 1x3"),
        ({}, "probs", b'{"predictions": {"a": 1}}', "answers no list at predictions"),
        ({}, "probs", b'{"error": "x"}', "answers nothing at predictions"),
        ({}, "probs", b'{"predictions": [[1.5, -0.5, 0]]}', "numbers from -0.5 to 1.5, which are not probabilities"),
        ({}, "probs", b'{"predictions": [[0.4, 0.4, 0.4]]}', "sum to 1.2"),
        ({"form": "label-index"}, "label", b'{"predictions": [3]}', "labels from 3 to 3, and there are 3 classes"),
        ({"form": "label-index"}, "label", b'{"predictions": [-1]}', "labels from -1 to -1"),
        ({"form": "label-index"}, "label", b'{"predictions": [1.0]}', "labels of type float64"),
        ({"form": "label-index"}, "label", b'{"predictions": [[0.1, 0.2, 0.7]]}', "expected a label for each"),
        ({"form": "label-name"}, "label", b'{"predictions": ["wolf"]}', "answers class 'wolf', which is not one of"),
        ({"form": "label-score-list"}, "label", b'{"predictions": [[]]}', "no list of labels with scores"),
        (
            {"form": "label-score-list"}, "label",
            b'{"predictions": [[{"label": "cat", "score": 1}, {"label": "pets/cat", "score": 0}]]}', "twice",
        ),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_named(template: dict[str, Any], access: Access, body: bytes, says: str) -> None:
    with pytest.raises(BadAnswer) as caught:
        adapter(by_template(access, **template)).answers({}, body, 1)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", ["-1", "x", "9" * 30, "99999"])
def test_a_length_of_a_header_that_cannot_be_is_no_answer(length: str) -> None:
    with pytest.raises(BadAnswer):
        adapter(asked()).answers({protocol.HEADER_LENGTH: length}, b"{}", 1)


@pytest.mark.parametrize("access", ["label", "probs"])
def test_long_texts_take_no_memory(access: Access) -> None:
    """NumPy would make all of a million elements as long as the longest one: 400 GB."""
    values = ["x" * 100_000] + ["cat"] * 999_999
    with pytest.raises(BadAnswer):
        Checked(asked(access)).of(values, len(values))


def test_a_name_that_two_classes_share_is_no_answer() -> None:
    classes = ("a/cat", "b/cat", "c/dog")
    checked = Checked(asked("label", classes=classes))
    assert [checked.index(name) for name in ("a/cat", b"b/cat", "dog")] == [0, 1, 2]
    with pytest.raises(BadAnswer, match="answers class 'cat'"):
        checked.index("cat")


@PROPERTY
@given(
    seed=st.integers(0, 1000),
    classes=st.integers(2, 60),
    decimals=st.sampled_from([None, 1, 2, 4]),
    top_k=st.sampled_from([None, 1, 3]),
)
def test_whatever_is_rounded_or_cut_as_the_entry_says_is_taken(
    seed: int, classes: int, decimals: int | None, top_k: int | None
) -> None:
    names = tuple(f"c/{i}" for i in range(classes))
    logits = 3 * normal(5, classes, seed=seed).float()
    found = rounded(logits, "probs", decimals=decimals, top_k=top_k)
    one = asked(terms=Terms(decimals=decimals, top_k=top_k), classes=names)
    assert np.array_equal(Checked(one).of(found, 5), found.astype(np.float32))
    with pytest.raises(BadAnswer):
        Checked(one).of(found * np.float32(2 + classes), 5)


def test_probabilities_may_miss_one_by_what_rounding_does_and_no_more() -> None:
    ten = tuple(f"c/{i}" for i in range(10))
    row = np.full((1, 10), 0.1, np.float32)
    for decimals, slack in ((None, 1e-3), (2, 0.05 + 1e-3), (1, 0.5 + 1e-3)):
        checked = Checked(asked(terms=Terms(decimals=decimals), classes=ten))
        for sign in (-1, 1):
            checked.of(row * np.float32(1 + sign * 0.98 * slack), 1)
            with pytest.raises(BadAnswer, match="sum to"):
                checked.of(row * np.float32(1 + sign * 1.02 * slack), 1)
    cut = Checked(asked(terms=Terms(top_k=2), classes=ten))
    cut.of(np.eye(1, 10, dtype=np.float32) * np.float32(0.3), 1)
    with pytest.raises(BadAnswer, match="more than top_k = 2"):
        cut.of(row, 1)


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (lambda: by_template("label"), "form vector does not give access 'label'"),
        (lambda: by_template("probs", form="label-index"), "form label-index does not give access 'probs'"),
        (lambda: asked(adapter="hf-image-classification", output=None, channels=2), "a PNG has 1 or 3 channels"),
        (lambda: asked(mean=[0.0], std=[1.0]), "api.mean has 1 values, the images 3 channels"),
    ],
)
def test_an_entry_that_its_adapter_cannot_carry_out_is_an_error_of_use(one: Any, says: str) -> None:
    with pytest.raises(UsageError, match="t: ") as caught:
        adapter(one())
    assert says in str(caught.value)
