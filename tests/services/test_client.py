"""A client finds out whether a server takes binary tensors, puts the key where the template says, and is patient."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from ray_dfml.data.services import Api, Asked
from ray_dfml.errors import RejectedError
from ray_dfml.services import client
from ray_dfml.services.gateway import Gateway
from tests.services.faulty import CLASSES, KEY, SIDE, FaultyService, served, service, truth
from tests.support import unique_images


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)


class WithoutBytes(FaultyService):
    """A server that refuses binary tensors with 400, and answers requests only after it has got `together` of them."""

    def __init__(self, together: int) -> None:
        super().__init__()
        self.together, self.refused = together, 0

    async def answer(self, request: web.BaseRequest, fault: str | None, numbers: list[int], binary: bool) -> Any:
        if not binary:
            return await super().answer(request, fault, numbers, binary)
        self.refused += 1
        while self.refused < self.together:
            await asyncio.sleep(0.005)
        return web.json_response({"error": "no binary here"}, status=400)


def test_all_requests_that_try_bytes_at_once_go_over_to_json(tmp_path: Path) -> None:
    """After a resume the first requests go out together, and each gets the refusal."""
    images = unique_images(9, (1, SIDE, SIDE))
    server = WithoutBytes(together=2)
    with served(server) as url:
        with Gateway(tmp_path / "ledger.sqlite", [service(url, binary="off")]) as gateway:
            gateway.ask("svc", images[:1])
        with Gateway(tmp_path / "ledger.sqlite", [service(url, concurrency=2)]) as gateway:
            assert (gateway.ask("svc", images) == truth(range(9))).all()
            assert (server.refused, gateway.totals()["svc"].sent) == (2, 9 + 8)
            assert gateway.reached("svc")[0].binary == "off"


@pytest.mark.parametrize("fault", ["502", "503", "504", "408", "half", "reset"])
def test_a_fault_of_the_way_says_nothing_about_bytes(tmp_path: Path, fault: str) -> None:
    server = FaultyService([fault])
    with served(server) as url, Gateway(tmp_path / "ledger.sqlite", [service(url)]) as gateway:
        gateway.ask("svc", unique_images(3, (1, SIDE, SIDE)))
        assert gateway.reached("svc")[0].binary == "on"
        assert server.batches == [1, 1, 2]


def test_a_service_that_answered_before_a_resume_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is away for longer than an address that was never reached is given."""
    monkeypatch.setattr(client, "FIRST_PATIENCE", 0.05)
    images, server = unique_images(2, (1, SIDE, SIDE)), FaultyService()
    with served(server) as url, Gateway(tmp_path / "ledger.sqlite", [service(url)]) as gateway:
        gateway.ask("svc", images[:1])
    asked = service(url, input="pixels", datatype="FP32")
    start = time.monotonic()
    with (
        Gateway(tmp_path / "ledger.sqlite", [asked], patience=1.0) as gateway,
        pytest.raises(RejectedError, match="cannot be reached"),
    ):
        gateway.ask("svc", images)
    assert time.monotonic() - start > 0.4


def test_the_key_goes_into_the_body_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one with letters that JSON escapes."""
    key = KEY + '"\\'
    monkeypatch.setenv("THE_KEY", key)
    seen: list[tuple[Any, dict[str, str]]] = []

    async def handler(request: web.BaseRequest) -> web.Response:
        seen.append((json.loads(await request.read()), dict(request.headers)))
        return web.json_response({"predictions": [[1.0, 0.0, 0.0]]})

    with served(handler) as url:
        template = {
            "path": "/p", "answer": "predictions", "form": "vector",
            "body": {"auth": {"token": "$KEY"}, "x": ["$flat"]},
        }  # fmt: skip
        api = Api.model_validate({"url": url, "adapter": "json", "key_env": "THE_KEY", "template": template})
        with Gateway(tmp_path / "ledger.sqlite", [Asked(card=service(url).card, api=api)]) as gateway:
            assert gateway.ask("svc", unique_images(1, (1, SIDE, SIDE))).shape == (1, CLASSES)
    ((body, headers),) = seen
    assert body["auth"] == {"token": key}
    assert len(body["x"][0]) == SIDE * SIDE
    assert "Authorization" not in headers
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.iterdir())
