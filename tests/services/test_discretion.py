"""A key stands nowhere but in a request, whatever a server repeats; and what only waits ends when the run does."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

from ray_dfml.errors import Interrupted, RejectedError
from ray_dfml.services import client
from ray_dfml.services.gateway import Gateway
from tests.services.faulty import CLASSES, FaultyService, served, service
from tests.support import unique_images

KEY = "sk-" + "0123456789abcdef" * 6
"""Longer than the names that messages show whole."""

Reply = Callable[[str], web.Response]


def tensor(key: str) -> web.Response:
    outputs = [{"name": f"Bearer {key}", "datatype": "FP32", "shape": [1, CLASSES], "data": [1, 0, 0]}]
    return web.json_response({"outputs": outputs})


def escaped(key: str) -> web.Response:
    """The first letters are escaped, so that the key does not stand in the bytes of the answer."""
    codes = "".join(f"\\u{ord(letter):04x}" for letter in key[:3])
    return web.Response(text=f'{{"error": "bad {codes}{key[3:]}"}}', status=500, content_type="application/json")


REPLIES: dict[str, Reply] = {
    "name of an output": tensor,
    "error": lambda key: web.json_response({"error": f"bad {key}"}, status=401),
    "error that passes": lambda key: web.json_response({"detail": {"key": key}}, status=503),
    "escaped": escaped,
    "redirect": lambda key: web.Response(status=307, headers={"Location": f"https://{key}.example/{key}"}),
    "redirect to nowhere": lambda key: web.Response(status=307, headers={"Location": f"https://[{key}"}),
    "web page": lambda key: web.Response(text=f"<html>{key}", content_type="text/html"),
}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)


def hides(text: str) -> bool:
    """Whether a text has neither the key nor a large part of it."""
    return not any(KEY[start : start + 12] in text for start in range(len(KEY) - 11))


def refused(path: Path, answer: Reply, caplog: pytest.LogCaptureFixture, **api: object) -> str:
    """What is said and logged of a server that answers so, after asking it."""

    async def handler(request: web.BaseRequest) -> web.Response:
        return answer(request.headers["Authorization"].removeprefix("Bearer "))

    with served(handler) as url:
        asked = service(url, key_env="THE_KEY", input="x", datatype="FP32", **api)
        with Gateway(path / "l.sqlite", [asked]) as gateway, pytest.raises(RejectedError) as caught:
            gateway.ask("svc", unique_images(1, asked.card.image.shape))
    assert caught.value.__cause__ is None
    return str(caught.value) + caplog.text


@pytest.mark.parametrize("name", REPLIES)
def test_no_message_holds_a_key_that_a_server_repeats(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = refused(tmp_path, REPLIES[name], caplog)
    assert hides(said), said
    assert all(hides(file.read_bytes().decode("latin1")) for file in tmp_path.iterdir())


def test_nor_a_label_that_is_the_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It would be cut in the message, so that no whole key could be found there."""
    wrong: Reply = lambda key: web.json_response([{"label": key, "score": 1.0}])  # noqa: E731
    said = refused(tmp_path, wrong, caplog, adapter="hf-image-classification", output=None)
    assert "which is not one of toy/0" in said
    assert hides(said), said


def test_nor_a_description_of_a_model(tmp_path: Path) -> None:
    server = FaultyService()
    server.description = json.loads(json.dumps(server.description).replace("answer", f"Bearer {KEY}"))
    with (
        served(server) as url, Gateway(tmp_path / "l.sqlite", [service(url, key_env="THE_KEY")]) as gateway,
        pytest.raises(RejectedError, match=r"has no output 'answer'; it has Bearer \[key\], other") as caught,
    ):  # fmt: skip
        gateway.describe("svc")
    assert hides(str(caught.value))


def test_a_key_of_digits_changes_no_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "123456")

    async def handler(request: web.BaseRequest) -> web.Response:
        outputs = [{"name": "answer", "datatype": "FP32", "shape": [1, CLASSES], "data": [0.123456, 0.876544, 0]}]
        return web.json_response({"outputs": outputs})

    with (
        served(handler) as url,
        Gateway(tmp_path / "l.sqlite", [service(url, key_env="THE_KEY", input="x", datatype="FP32")]) as gateway,
    ):
        found = gateway.ask("svc", unique_images(1, service(url).card.image.shape))
    assert found.tolist() == [[pytest.approx(0.123456), pytest.approx(0.876544), 0]]


def test_a_batch_that_only_waits_ends_with_the_run(tmp_path: Path) -> None:
    """The service asks for 300 seconds; the gateway closes long before it would give up answers on their way."""
    busy = threading.Event()

    async def handler(request: web.BaseRequest) -> web.Response:
        busy.set()
        return web.Response(status=429, headers={"Retry-After": "300"})

    found: list[BaseException] = []
    with served(handler) as url:
        asked = service(url, input="x", datatype="FP32")
        gateway = Gateway(tmp_path / "l.sqlite", [asked])

        def ask() -> None:
            try:
                gateway.ask("svc", unique_images(1, asked.card.image.shape))
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        assert busy.wait(30)
        began = time.monotonic()
        gateway.close()
        assert time.monotonic() - began < 20
        thread.join()
    assert [type(error) for error in found] == [Interrupted]
