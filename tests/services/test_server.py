"""The server: the bits of the teacher, honest counts, bounds, and one line for whatever is wrong with a request."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.core.answers import answers
from ray_dfml.core.images import normalise
from ray_dfml.data.services import Api, Asked
from ray_dfml.services import hosting, server
from ray_dfml.services.gateway import Gateway
from ray_dfml.services.hosting import OUTPUTS
from ray_dfml.services.protocol import HEADER_LENGTH, Tensor, pack, unpack
from ray_dfml.types import Access, TeacherCard
from tests.services.serving import (
    SHAPE,
    TEACHER,
    Reply,
    Running,
    counts,
    get,
    images,
    post,
    request_of,
    running,
    send,
    served,
)
from tests.support import PROPERTY, card, random_teacher

LEVELS: tuple[Access, ...] = ("logits", "probs", "label")


def wanted(x: np.ndarray, access: Access, **terms: Any) -> np.ndarray:
    """What the teacher itself answers, in one call on at least eight images."""
    mean, std = (torch.tensor(values) for values in (TEACHER.card.image.mean, TEACHER.card.image.std))
    with torch.no_grad():
        logits = TEACHER.net(TEACHER.theta, normalise(torch.tensor(x), mean, std), TEACHER.stats)
    return answers(logits, access, **terms)


def answered(reply: Reply) -> Tensor:
    """The only output of an answer."""
    assert reply.status == 200, reply.body
    length = reply.headers.get(HEADER_LENGTH)
    (found,) = unpack("outputs", reply.body, None if length is None else int(length)).tensors
    return found


@pytest.fixture(scope="module")
def label(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that gives labels."""
    with running([served("label")], tmp_path_factory.mktemp("label")) as found:
        yield found


@pytest.mark.parametrize("access", LEVELS)
def test_the_answers_are_the_teachers_bits(access: Access, tmp_path: Path) -> None:
    x = images(70)
    with running([served(access)], tmp_path) as (url, _):
        said = get(url, "/v2/models/t").json
        for binary in (False, True):
            for wants in ({}, {"outputs": [{"name": OUTPUTS[access], "parameters": {"binary_data": True}}]}):
                found = answered(post(url, request_of(x, binary=binary, **wants)))
                assert found.array.tobytes() == wanted(x, access).tobytes()
                (output,) = said["outputs"]
                assert (found.name, found.datatype) == (output["name"], output["datatype"]) == (
                    OUTPUTS[access], "INT64" if access == "label" else "FP32",
                )  # fmt: skip
        single = answered(post(url, request_of(x[3:4])))
        assert single.array.tobytes() == wanted(x, access)[3:4].tobytes()
    assert said["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, *SHAPE]}]


def test_probabilities_are_rounded_and_cut(tmp_path: Path) -> None:
    x = images(9)
    with running([served("probs", decimals=2, top_k=2)], tmp_path) as (url, _):
        found = answered(post(url, request_of(x)))
    np.testing.assert_array_equal(found.array, wanted(x, "probs", decimals=2, top_k=2))
    assert ((found.array > 0).sum(1) <= 2).all()


def test_bytes_are_answered_where_they_are_wanted(label: Running) -> None:
    x = images(2)
    whole = request_of(x, parameters={"binary_data_output": True})
    one = request_of(x, parameters={"binary_data_output": True}, outputs=[
        {"name": "label", "parameters": {"binary_data": False}}
    ])  # fmt: skip
    assert HEADER_LENGTH in post(label.url, whole).headers
    assert HEADER_LENGTH not in post(label.url, one).headers


def test_json_without_a_content_type_and_an_id_come_back(label: Running) -> None:
    reply = post(label.url, request_of(images(1), id="seven"))
    assert (reply.json["id"], reply.json["model_name"]) == ("seven", "t")
    assert "id" not in post(label.url, request_of(images(1))).json


def changed(**changes: Any) -> bytes:
    """A request about two images with some fields of its input, or others, changed."""
    head = json.loads(request_of(images(2)).body)
    for name, value in changes.items():
        (head["inputs"][0] if name in head["inputs"][0] else head)[name] = value
    return json.dumps(head).encode()


NAN = images(2)
NAN[1, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"inputs": [', "not JSON"),
        (b"", "not JSON"),
        (changed(inputs=[]), "one input of images, got 0"),
        (json.dumps({"inputs": 2 * json.loads(changed())["inputs"]}).encode(), "one input of images, got 2"),
        (pack("inputs", {}, [Tensor("images", "UINT8", np.zeros((2, *SHAPE), np.uint8))], binary=True),
         "FP32 with pixels in [0, 1], got UINT8"),
        (changed(shape=[2, SHAPE[1] * SHAPE[2]]), "takes images of shape [n, 1x16x16]"),
        (request_of(np.zeros((2, 3, 16, 16), np.float32)), "takes images of shape [n, 1x16x16]"),
        (request_of(images(1)[0]), "takes images of shape [n, 1x16x16]"),
        (changed(shape=[3, *SHAPE]), "512 values"),
        (request_of(images(0)), "1 to 4096 images, got 0"),
        (request_of(np.zeros((4097, *SHAPE), np.float32), binary=True), "1 to 4096 images, got 4097"),
        (request_of(NAN, binary=True), "NaN"),
        (changed(data=[None] * 512), "not all numbers"),
        (request_of(images(2) * 255), "divide by 255"),
        (request_of(images(2) - 0.5), "not all in [0, 1]"),
        (changed(outputs=[{"name": "logits"}]), "t gives 'label', not 'logits'"),
        (changed(outputs=[{"name": "probabilities"}]), "t gives 'label', not 'probabilities'"),
        (changed(outputs=[{"name": "label"}, {"name": "logits"}]), "not 'logits'"),
        (changed(outputs=[{"name": "label", "parameters": {"classification": 3}}]), "no parameter 'classification'"),
        (changed(outputs=["label"]), "an object with a name"),
        (changed(outputs="label"), "outputs a list"),
        (changed(parameters=[]), "parameters are an object"),
        (changed(id=7), "id of a request is a text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_wrong_request_is_refused_in_one_line_and_not_counted(body: Any, said: str, label: Running) -> None:
    before = counts(label.url)
    reply = post(label.url, body)
    assert (reply.status, list(reply.json)) == (400, ["error"])
    assert said in reply.json["error"]
    assert "\n" not in reply.json["error"]
    assert counts(label.url) == before


@pytest.mark.parametrize("length", ["x", "-1", "", "9" * 40])
def test_a_wrong_length_of_the_json_is_refused(length: str, label: Running) -> None:
    reply = post(label.url, request_of(images(1)).body, **{HEADER_LENGTH: length})
    assert (reply.status, HEADER_LENGTH in reply.json["error"]) == (400, True)


@given(st.data())
@PROPERTY
def test_no_body_is_a_defect(label: Running, data: st.DataObject) -> None:
    """Whatever is done to a good request, the server answers it or says what is wrong with it."""
    body = bytearray(request_of(images(1), id="a", outputs=[{"name": "label"}], binary=True).body)
    for _ in range(data.draw(st.integers(0, 8))):
        place = data.draw(st.integers(0, 250))
        body[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    length = data.draw(st.sampled_from([len(body) - 1024, len(body), 0, None]))
    headers = {} if length is None else {HEADER_LENGTH: str(length)}
    assert post(label.url, bytes(body), **headers).status in (200, 400)
    assert label.notes == []


def test_what_is_not_here_is_said_in_json(label: Running) -> None:
    for method, path, status, said in (
        ("GET", "/v2/models/T", 404, "no model 'T' here (did you mean 't'?)"),
        ("GET", "/v2/models/t/versions/2", 404, "t has version 1 only"),
        ("POST", "/v2/models/x/infer", 404, "no model 'x' here"),
        ("GET", "/v1/models/t", 404, "GET /v1/models/t: Not Found"),
        ("DELETE", "/v2", 405, "DELETE /v2: Method Not Allowed"),
    ):
        reply = send(label.url, method, path)
        assert (reply.status, reply.json) == (status, {"error": said})


def test_bodies_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what they announce, by what comes, and by what it is once it is unpacked."""
    monkeypatch.setattr(server, "MOST_BYTES", 50_000)
    with running([served("label")], tmp_path) as (url, _):
        large = b"[" + b" " * 60_000
        assert post(url, large).json == {"error": "a body has at most 50000 bytes"}
        path = "/v2/models/t/infer"
        assert send(url, "POST", path, iter([large])).status == 413
        small = gzip.compress(large)
        assert len(small) < 1000
        assert post(url, small, **{"Content-Encoding": "gzip"}).status == 413
        packed = gzip.compress(request_of(images(1)).body)
        assert post(url, packed, **{"Content-Encoding": "gzip"}).status == 200


def test_a_broken_request_is_not_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with running([served("label")], tmp_path, token="tok-3f9a") as (url, notes):
        place = urlsplit(url)
        line = socket.create_connection((place.hostname, place.port))
        line.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer tok-3f9a\x00\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.0 400")
        line.close()
    assert notes == []
    assert "tok-3f9a" not in "".join(capfd.readouterr())


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_WAITING", 1000)
    with running([served("label")], tmp_path) as (url, _):
        reply = post(url, request_of(images(1)))
        assert (reply.status, reply.headers["Retry-After"]) == (429, "1")
        assert counts(url) == (0, 0)


def test_a_compressed_body_waits_for_as_much_as_it_may_become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = gzip.compress(request_of(images(1)).body)
    with running([served("label")], tmp_path) as (url, _):
        assert post(url, small, **{"Content-Encoding": "gzip"}).status == 200
        monkeypatch.setattr(server, "MOST_WAITING", server.MOST_BYTES - 1)
        reply = post(url, small, **{"Content-Encoding": "gzip"})
        assert (reply.status, reply.headers["Retry-After"]) == (429, "1")
        assert post(url, request_of(images(1))).status == 200


def test_a_body_that_does_not_arrive_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.1)
    with running([served("label")], tmp_path) as (url, _):
        reply = post(url, b"{", **{"Content-Length": "2"})
        assert (reply.status, reply.json) == (408, {"error": "the body did not arrive within 0.1 s"})


def test_the_rate_is_bounded(tmp_path: Path) -> None:
    with running([served("label")], tmp_path, rate=100.0) as (url, _):
        assert post(url, request_of(images(150))).status == 200
        reply = post(url, request_of(images(1)))
        assert (reply.status, reply.headers["Retry-After"]) == (429, "1")
        assert "more images a second" in reply.json["error"]
        assert counts(url) == (150, 150)
        time.sleep(1)
        assert post(url, request_of(images(1))).status == 200


def test_requests_that_wait_share_a_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, gate, entered = [], threading.Event(), threading.Event()
    true = hosting.steady_logits

    def slow(network: Any, theta: Any, stats: Any, x: np.ndarray, *rest: Any) -> torch.Tensor:
        passes.append(len(x))
        entered.set()
        assert gate.wait(30)
        return true(network, theta, stats, x, *rest)

    monkeypatch.setattr(hosting, "steady_logits", slow)
    monkeypatch.setattr(hosting, "TOGETHER", 12)
    x = images(20)
    with running([served("logits")], tmp_path) as (url, _), ThreadPoolExecutor(20) as pool:
        first = pool.submit(post, url, request_of(x[:1], binary=True))
        assert entered.wait(30)
        others = [pool.submit(post, url, request_of(x[i : i + 1], binary=True)) for i in range(1, 20)]
        time.sleep(0.5)
        gate.set()
        rows = [answered(one.result(30)).array for one in (first, *others)]
        assert counts(url) == (20, 20)
    assert passes == [1, 12, 7]
    assert np.concatenate(rows).tobytes() == wanted(x, "logits").tobytes()


def test_a_repeat_of_a_request_is_received_again_and_answered_once(tmp_path: Path) -> None:
    x = images(3)
    with running([served("label")], tmp_path) as (url, _):
        for _ in range(2):
            assert post(url, request_of(x, id="a")).status == 200
        assert counts(url) == (6, 3)
        assert post(url, request_of(x, id="a", binary=True)).status == 200
        assert counts(url) == (9, 3)
        assert post(url, request_of(x[:2], id="a")).status == 200
        assert counts(url) == (11, 5), "other images are another request, whatever its id"
        for _ in range(2):
            assert post(url, request_of(x)).status == 200
        assert counts(url) == (17, 11), "without an id nothing is a repeat"
    with running([served("label")], tmp_path) as (url, _):
        assert post(url, request_of(x, id="a")).status == 200
        assert counts(url) == (20, 11), "the counts outlive the server"


def test_each_model_has_counts_of_its_own(tmp_path: Path) -> None:
    with running([served("label"), served("probs", id="u")], tmp_path) as (url, _):
        assert post(url, request_of(images(2), id="a")).status == 200
        assert post(url, request_of(images(2), id="a"), model="u").status == 200
        found = get(url, "/stats").json
    assert found == {
        "received": 4, "answered": 4,
        "models": {"t": {"received": 2, "answered": 2}, "u": {"received": 2, "answered": 2}},
    }  # fmt: skip


def test_what_a_bad_model_makes_is_not_an_answer(tmp_path: Path) -> None:
    bad = random_teacher(card(0, channels=1, way=3))
    bad.theta[:] = float("nan")
    with running([served("label", teacher=bad)], tmp_path) as (url, notes):
        reply = post(url, request_of(images(2)))
        assert (reply.status, reply.json) == (500, {"error": "t makes NaN or infinity of these images"})
        assert notes == ["t makes NaN or infinity of these images"]
        assert counts(url) == (2, 0)


def test_an_answer_that_cannot_be_counted_is_not_given(tmp_path: Path) -> None:
    with running([served("label")], tmp_path) as (url, notes):
        (tmp_path / "served.sqlite").write_bytes(b"no database")
        for suffix in ("-wal", "-shm"):
            (tmp_path / f"served.sqlite{suffix}").unlink()
        reply = get(url, "/stats")
        assert (reply.status, "cannot be kept here" in reply.json["error"]) == (500, True)
        assert len(notes) == 1


def test_a_token_is_asked_for_and_never_shown(tmp_path: Path) -> None:
    token = "tok-3f9a"
    with running([served("label")], tmp_path, token=token) as (url, notes):
        for given in ({}, {"Authorization": "Bearer tok-3f9b"}, {"Authorization": "Bearer é"}):
            for reply in (post(url, request_of(images(1)), **given), get(url, "/stats", **given)):
                assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, "Bearer")
                assert token not in reply.body.decode()
        assert get(url, "/v2/health/live").status == 200
        right = {"Authorization": f"Bearer {token}", "Host": "teachers.example"}
        assert post(url, request_of(images(1)), **right).status == 200
        assert counts(url, **right) == (1, 1)
        assert token not in get(url, "/openapi.json", **right).body.decode()
        assert notes == []


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "["}, {"Origin": "https://evil.example"}])
def test_a_page_in_a_browser_cannot_ask(headers: dict[str, str], label: Running) -> None:
    assert post(label.url, request_of(images(1)), **headers).status == 403
    assert get(label.url, "/v2/health/live", **headers).status == 200


def test_our_client_keeps_to_the_rate_that_the_server_asks_for(tmp_path: Path) -> None:
    """What was refused for now is asked again, counted as sent by the client, and not as received by the server."""
    known = TeacherCard(id="t", arch="", image=TEACHER.card.image, classes=TEACHER.card.classes, access="label")
    x = np.random.default_rng(0).integers(0, 256, (60, *SHAPE), dtype=np.uint8)
    with running([served("label")], tmp_path, rate=20.0) as (url, _):
        api = Api(url=url, adapter="oip", model="t", output="label", batch=30, concurrency=1)
        start = time.monotonic()
        with Gateway(tmp_path / "ledger.sqlite", [Asked(card=known, api=api)]) as gateway:
            found = gateway.ask("t", x)
            spent = gateway.totals()["t"]
        assert counts(url) == (60, 60)
    assert time.monotonic() - start > 0.5, "31 leave a debt of 11, at 20 a second"
    assert spent.answered == 60 < spent.sent
    np.testing.assert_array_equal(found, wanted(x.astype(np.float32) / 255, "label"))
