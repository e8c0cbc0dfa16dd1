"""The gateway against real servers on this machine: what is sent, counted, retried, kept and refused."""

import json
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_dfml.data.services import Asked, Budget, Terms
from ray_dfml.errors import BudgetReached, Interrupted, RejectedError, ServiceAway, UsageError
from ray_dfml.services import client
from ray_dfml.services.gateway import Gateway
from tests.services.faulty import KEY, SIDE, FaultyService, Recorder, served, service, truth
from tests.support import unique_images


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)


def images(n: int, first: int = 0) -> np.ndarray:
    return unique_images(n, (1, SIDE, SIDE), first)


class Scene:
    """A faulty service behind a recording proxy, and the folder of a ledger."""

    def __init__(self, folder: Path, server: FaultyService, proxy: Recorder, url: str) -> None:
        self.folder, self.server, self.proxy, self.url = folder, server, proxy, url

    def gateway(self, asked: Asked | None = None, **limits: Any) -> Gateway:
        return Gateway(self.folder / "ledger.sqlite", [asked or service(self.url)], **limits)

    def laws(self, gateway: Gateway) -> None:
        """answered <= received <= sent, and sent is what the proxy saw."""
        spent = gateway.totals()["svc"]
        assert spent.answered <= self.server.received <= spent.sent
        assert spent.sent == self.proxy.seen


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    server = FaultyService()
    with served(server) as upstream:
        proxy = Recorder(upstream)
        with served(proxy) as url:
            yield Scene(tmp_path, server, proxy, url)


@pytest.mark.parametrize("access", ["probs", "logits", "label"])
@pytest.mark.parametrize("binary", ["on", "off", "auto"])
@pytest.mark.parametrize("as_float", [False, True])
def test_answers_come_in_the_order_of_the_images(scene: Scene, access: Any, binary: str, as_float: bool) -> None:
    scene.server.access = access
    asked = images(11) if not as_float else images(11).astype(np.float32) / np.float32(255)
    with scene.gateway(service(scene.url, access=access, binary=binary)) as gateway:
        found = gateway.ask("svc", asked)
        assert np.array_equal(found, truth(range(11), access))
        assert found.dtype == (np.int64 if access == "label" else np.float32)
        assert gateway.totals()["svc"].sent == gateway.totals()["svc"].answered == scene.server.received == 11
        scene.laws(gateway)
    assert scene.server.batches[0] == 1  # the first image tries the service
    assert sorted(scene.server.batches[1:]) == [2, 4, 4]


def test_nothing_is_asked_twice_in_a_call_a_process_or_a_later_process(scene: Scene) -> None:
    twice = np.concatenate([images(6), images(6)[::-1]])
    with scene.gateway() as gateway:
        assert np.array_equal(gateway.ask("svc", twice), truth([*range(6), *reversed(range(6))]))
        gateway.ask("svc", images(6)[2:4])
        assert scene.server.received == 6
    with scene.gateway() as gateway:
        assert np.array_equal(gateway.ask("svc", images(8)), truth(range(8)))
        assert sorted(scene.server.numbers) == list(range(8))
        scene.laws(gateway)


def test_threads_that_ask_about_the_same_images_pay_once(scene: Scene) -> None:
    scene.server.delay = 0.02
    found: dict[int, np.ndarray] = {}
    with scene.gateway() as gateway:

        def work(first: int) -> None:
            found[first] = gateway.ask("svc", images(12, first))

        threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 12, 3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert sorted(scene.server.numbers) == list(range(21))
        scene.laws(gateway)
    assert all(np.array_equal(rows, truth(range(first, first + 12))) for first, rows in found.items())


PASSING = [
    "429",
    "500",
    "503",
    "truncated",
    "half",
    "html",
    "nan",
    "null",
    "classes",
    "shape",
    "other",
    "sums",
    "reset",
]


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("binary", ["on", "off"])
def test_a_fault_that_passes_is_paid_for_and_forgotten(scene: Scene, fault: str, binary: str) -> None:
    scene.server.faults = iter([None, fault, None, fault])
    with scene.gateway(service(scene.url, binary=binary, concurrency=1)) as gateway:
        assert np.array_equal(gateway.ask("svc", images(9)), truth(range(9)))
        assert gateway.totals()["svc"].answered == 9
        assert gateway.totals()["svc"].sent == 9 + 4 + 4
        scene.laws(gateway)
    assert len(set(scene.server.ids)) == 3  # attempts of a batch share their id


def test_silence_is_given_up_and_repeated(scene: Scene) -> None:
    scene.server.faults = iter([None, "stall"])
    with scene.gateway(service(scene.url, timeout=0.3)) as gateway:
        assert np.array_equal(gateway.ask("svc", images(5)), truth(range(5)))
        assert gateway.totals()["svc"].sent == 9
        scene.laws(gateway)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("500", "svc: fails with status 500: out of memory"),
        ("html", "svc: answers a web page instead of JSON"),
        ("nan", "svc: answers NaN or infinite numbers"),
        ("classes", "svc: answers shape 4x4, expected 4x3: 4 images and 3 classes"),
        ("sums", "svc: answers probabilities that sum to 0.9"),
        ("other", "svc: answers no output 'answer', but 'other'"),
        ("reset", "svc: the connection broke (ServerDisconnectedError)"),
    ],
)
def test_a_fault_that_stays_ends_after_three_tries(scene: Scene, fault: str, says: str) -> None:
    scene.server.faults = iter([None, *[fault] * 9])
    with scene.gateway(service(scene.url, concurrency=1, binary="off")) as gateway:
        with pytest.raises(RejectedError) as caught:
            gateway.ask("svc", images(13))
        assert str(caught.value).startswith(says)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, ServiceAway) == (fault in ("500", "reset"))
        assert (gateway.totals()["svc"].sent, gateway.totals()["svc"].answered) == (1 + 3 * 4, 1)
        scene.laws(gateway)
        scene.server.faults = iter([])
        assert np.array_equal(gateway.ask("svc", images(13)), truth(range(13)))
        assert scene.server.numbers.count(0) == 1


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("401", "refuses the key in THE_KEY (401)"),
        ("404", "has no model m (404): no"),
        ("413", "a batch is too large (413); lower api.batch, now 4: no"),
        ("418", "refuses the request with status 418: no"),
        ("redirect", "answers with a redirect to https://elsewhere.example, which is not followed"),
    ],
)
def test_a_refusal_is_not_repeated_and_no_key_is_shown(
    scene: Scene, fault: str, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    scene.server.faults = iter([None, fault])
    with scene.gateway(service(scene.url, key_env="THE_KEY")) as gateway:
        gateway.ask("svc", images(1))
        assert scene.server.headers[0]["Authorization"] == f"Bearer {KEY}"
        with pytest.raises(RejectedError) as caught:
            gateway.ask("svc", images(5))
        assert says in str(caught.value)
        assert gateway.totals()["svc"].sent == 5
        scene.laws(gateway)
        gateway.export(scene.folder / "ledger.jsonl")
    said = [str(caught.value), *traceback.format_exception(caught.value), caplog.text]
    files = [path.read_bytes().decode("latin1") for path in scene.folder.iterdir()]
    assert not any(KEY in text for text in said + files)
    assert not any("pw" in text or "sig=1" in text for text in said)


@pytest.mark.parametrize("key", [None, "", " padded ", "two\nlines"])
def test_without_a_key_nothing_is_sent(scene: Scene, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("THE_KEY", key)
    with scene.gateway(service(scene.url, key_env="THE_KEY")) as gateway:
        with pytest.raises(UsageError, match="svc: the environment variable THE_KEY") as caught:
            gateway.ask("svc", images(5))
        assert "padded" not in str(caught.value)
        assert gateway.totals()["svc"].sent == scene.proxy.seen == 0


def test_a_service_that_is_busy_is_left_in_peace_by_all_its_requests(scene: Scene) -> None:
    scene.server.faults = iter([None, "429-after"])
    with scene.gateway(service(scene.url, concurrency=1)) as gateway:
        start = time.monotonic()
        gateway.ask("svc", images(9))
        assert time.monotonic() - start > 1
        assert gateway.totals()["svc"].sent == 13
        scene.laws(gateway)


def test_a_service_that_stays_busy_ends_the_patience(scene: Scene) -> None:
    scene.server.faults = iter([None, *["429"] * 99])
    with scene.gateway(patience=0.2) as gateway:
        with pytest.raises(ServiceAway, match=r"svc: is busy \(429\)"):
            gateway.ask("svc", images(5))
        scene.laws(gateway)


def test_a_refused_connection_costs_nothing(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        asked = service(f"http://127.0.0.1:{port}", input="pixels", datatype="FP32")
        with Gateway(tmp_path / "l.sqlite", [asked], patience=0.2) as gateway:
            with pytest.raises(ServiceAway, match=f"svc: 127.0.0.1:{port} cannot be reached"):
                gateway.ask("svc", images(5))
            assert gateway.totals()["svc"].sent == 0
            gateway.export(tmp_path / "ledger.jsonl")
            assert (tmp_path / "ledger.jsonl").read_text() == ""


def test_a_budget_is_checked_before_anything_is_sent(scene: Scene) -> None:
    with scene.gateway(service(scene.url, terms=Terms(budget=10))) as gateway:
        gateway.ask("svc", images(6))
        with pytest.raises(BudgetReached, match="the budget of teacher svc is 10 images: 6 are sent and 5 more"):
            gateway.ask("svc", images(11))
        assert scene.server.received == 6
        assert np.array_equal(gateway.ask("svc", images(10)), truth(range(10)))  # what was answered costs nothing
        assert gateway.totals()["svc"].sent == 10
        scene.laws(gateway)


def test_repeats_are_charged_and_stop_at_the_budget_too(scene: Scene) -> None:
    scene.server.faults = iter([None, "500", "500"])
    with scene.gateway(service(scene.url, concurrency=1), run=Budget(queries=7)) as gateway:
        with pytest.raises(BudgetReached, match="the budget of the run is 7 images: 5 are sent and 4 more"):
            gateway.ask("svc", images(5))
        assert (gateway.totals()["svc"].sent, gateway.totals()["svc"].answered) == (5, 1)
        scene.laws(gateway)


def test_no_more_requests_are_under_way_than_allowed(scene: Scene) -> None:
    scene.server.delay = 0.03
    with scene.gateway(service(scene.url, concurrency=3, batch=1)) as gateway:
        threads = [threading.Thread(target=gateway.ask, args=("svc", images(8, 8 * i))) for i in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert scene.server.most_at_once == 3
    assert scene.server.received == 24


def test_a_rate_holds_over_batches_larger_than_a_second(scene: Scene) -> None:
    with scene.gateway(service(scene.url, rate=40, batch=20)) as gateway:
        start = time.monotonic()
        gateway.ask("svc", images(41))
        took = time.monotonic() - start
    assert 21 / 40 <= took < 2  # the last batch goes out when the 21 images before it have had their time


def test_binary_tensors_are_tried_once_with_one_image_and_json_is_used_if_they_fail(scene: Scene) -> None:
    scene.server.binary = False
    with scene.gateway(service(scene.url, binary="auto")) as gateway:
        assert np.array_equal(gateway.ask("svc", images(9)), truth(range(9)))
        assert gateway.totals()["svc"].sent == 10
        assert scene.server.batches == [1, 1, 4, 4]
        scene.laws(gateway)


def test_bytes_are_sent_to_a_server_that_takes_bytes_whatever_is_given(scene: Scene) -> None:
    scene.server.description["inputs"][0] |= {"datatype": "UINT8"}
    with scene.gateway(service(scene.url)) as gateway:
        gateway.ask("svc", images(3))
        gateway.ask("svc", images(3, 3).astype(np.float32) / np.float32(255))
    assert scene.server.types == ["uint8"] * 3
    assert scene.server.numbers == [*range(6)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"outputs": [{"name": "logits"}]}, "svc: the server has no output 'answer'; it has logits"),
        ({"inputs": [{"name": "a"}, {"name": "b"}]}, "svc: the model has inputs a, b; name one as api.input"),
        (
            {"inputs": [{"name": "a", "shape": [-1, 3, 32, 32]}]},
            "svc: the model takes images of shape [-1, 3, 32, 32], the entry says 1x4x4 in order nchw",
        ),
        ({"inputs": [{"name": "a", "datatype": "BYTES"}]}, "svc: the model takes 'BYTES' images; only FP32"),
    ],
)
def test_a_model_that_does_not_fit_its_entry_is_refused_before_an_image_is_sent(
    scene: Scene, change: dict[str, Any], says: str
) -> None:
    scene.server.description |= change
    with scene.gateway() as gateway:
        with pytest.raises(RejectedError) as caught:
            gateway.ask("svc", images(1))
        assert str(caught.value).startswith(says)
        assert gateway.totals()["svc"].sent == scene.proxy.seen == 0


@pytest.mark.parametrize("bad", [images(2)[:, 0], images(2)[:, :, 1:], images(2).astype(np.float64), images(0)])
def test_images_of_another_size_or_type_are_a_defect(scene: Scene, bad: np.ndarray) -> None:
    with scene.gateway() as gateway:
        with pytest.raises(ValueError, match="svc: "):
            gateway.ask("svc", bad)
        with pytest.raises(ValueError, match=r"pixels must be in \[0, 1\]"):
            gateway.ask("svc", images(2).astype(np.float32) * np.nan)
        assert scene.proxy.seen == 0


def test_a_redirect_takes_neither_images_nor_key_to_another_host(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    other = FaultyService()
    with served(other) as elsewhere, scene.gateway(service(scene.url, key_env="THE_KEY")) as gateway:
        scene.server.elsewhere = f"{elsewhere}/v2/models/m/infer"
        scene.server.faults = iter(["redirect"] * 9)
        with pytest.raises(RejectedError, match=f"redirect to {elsewhere}, which is not followed"):
            gateway.ask("svc", images(1))
        assert (other.received, other.headers, scene.server.received) == (0, [], 1)


def test_an_answer_without_end_is_not_read_to_its_end(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_BYTES", 1 << 20)
    scene.server.faults = iter(["bomb"])
    with scene.gateway(service(scene.url)) as gateway:
        with pytest.raises(RejectedError, match="svc: answers more than 1 MiB"):
            gateway.ask("svc", images(1))
        scene.laws(gateway)


def test_closing_lets_what_is_on_its_way_arrive_and_sends_nothing_more(scene: Scene) -> None:
    scene.server.delay = 0.1
    gateway = scene.gateway(service(scene.url, concurrency=2))
    raised: list[BaseException] = []

    def work() -> None:
        try:
            gateway.ask("svc", images(400))
        except Interrupted as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while scene.server.received < 9:
        time.sleep(0.01)
    gateway.close()
    thread.join()
    assert [str(error) for error in raised] == ["svc: the run ends; what was answered is kept"]
    with scene.gateway() as again:
        spent = again.totals()["svc"]
        assert 9 <= spent.answered == spent.sent == scene.server.received < 400


@pytest.mark.parametrize("seed", range(5))
def test_a_whole_run_of_random_faults_keeps_the_laws_and_every_answer(scene: Scene, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = ["429", "500", "truncated", "half", "html", "nan", "classes", "reset"]
    scene.server.faults = (rng.choice(kinds) if rng.random() < 0.12 else None for _ in iter(int, 1))
    count = 400
    with scene.gateway(service(scene.url, batch=8, binary="on")) as gateway:
        for _ in range(20):  # a failed job is repeated by whoever runs the jobs
            try:
                found = gateway.ask("svc", images(count))
                break
            except RejectedError:
                scene.laws(gateway)
        assert np.array_equal(found, truth(range(count)))
        assert gateway.totals()["svc"].answered == scene.server.right == count
        scene.laws(gateway)
        gateway.export(scene.folder / "ledger.jsonl")
    lines = [json.loads(line) for line in (scene.folder / "ledger.jsonl").read_text().splitlines()]
    assert sum(line["sent"] for line in lines) == scene.proxy.seen
    assert sum(line["answered"] for line in lines) == count
