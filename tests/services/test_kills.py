"""What dies takes no answer with it: the process of the gateway, and the server, killed at random points."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ray_dfml.services import client
from ray_dfml.services.gateway import Gateway
from ray_dfml.services.ledger import content_hashes
from tests.services.chaos import alive, kill
from tests.services.faulty import SIDE, FaultyService, Recorder, served, service, truth
from tests.support import unique_images

COUNT, BATCH = 240, 8

NURSERY = """
import os
import sys
from pathlib import Path
from ray_dfml.services.gateway import Gateway
from tests.services.faulty import SIDE, service
from tests.support import unique_images

path, url = Path(sys.argv[1]), sys.argv[2]
for _ in sys.stdin:
    if os.fork() == 0:
        with Gateway(path, [service(url, batch=8, binary="on")]) as gateway:
            print(os.getpid(), flush=True)
            for first in range(0, 240, 60):
                gateway.ask("svc", unique_images(60, (1, SIDE, SIDE), first))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


class Nursery:
    """A process that has imported all, and at each word forks one that asks about all images."""

    def __init__(self, path: Path, url: str) -> None:
        argv = [sys.executable, "-c", NURSERY, str(path), url]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, word: str = "") -> int:
        """Send a word, if one is given, and read a number."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word)
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture
def slow() -> Iterator[tuple[FaultyService, Recorder, str]]:
    server = FaultyService()
    server.delay = 0.02
    with served(server) as upstream:
        proxy = Recorder(upstream)
        with served(proxy) as url:
            yield server, proxy, url


def test_a_killed_gateway_loses_no_answer_and_never_pays_twice_for_one(
    tmp_path: Path, slow: tuple[FaultyService, Recorder, str]
) -> None:
    server, proxy, url = slow
    path, rng, kills, kept = tmp_path / "ledger.sqlite", random.Random(0), 0, 0
    asked = service(url, batch=BATCH, binary="on")
    nursery = Nursery(path, url)
    for _ in range(6):
        pid, enough = nursery.say("go\n"), server.received + BATCH * rng.randint(0, 3)
        while server.received < enough and alive(pid):
            time.sleep(0.001)
        kill(pid)
        kills += nursery.say() == -signal.SIGKILL
        wait_for_silence(server, proxy)
        before, numbers = server.received, list(server.numbers)
        with Gateway(path, [asked]) as gateway:
            spent = gateway.totals()["svc"]
            assert kept <= spent.answered <= server.right <= server.received <= spent.sent
            assert proxy.seen <= spent.sent
            kept = spent.answered
            known = [number for number in sorted(set(numbers)) if not len(missing(gateway, number))]
            assert len(known) == spent.answered
            if known:  # what was settled is answered without a request
                found = gateway.ask("svc", np.concatenate([one(number) for number in known]))
                assert np.array_equal(found, truth(known))
        assert server.received == before
    assert kills >= 4
    nursery.process.communicate()
    with Gateway(path, [asked]) as gateway:
        assert np.array_equal(gateway.ask("svc", images(COUNT)), truth(range(COUNT)))
        spent = gateway.totals()["svc"]
        assert spent.answered == COUNT <= server.received <= spent.sent
        assert spent.sent - COUNT <= kills * 4 * BATCH  # what was on its way at a kill, and no more
        gateway.export(tmp_path / "ledger.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert sum(line["answered"] for line in lines) == COUNT
    assert sum(line["sent"] for line in lines) == spent.sent


def wait_for_silence(server: FaultyService, proxy: Recorder) -> None:
    """Until what the dead process had sent is through: the proxy and the server have counted the same for a while."""
    quiet, last = 0, -1
    while quiet < 5:
        time.sleep(0.02)
        still = server.received == proxy.seen == last and not server.at_once
        quiet, last = (quiet + 1 if still else 0), proxy.seen


def one(number: int) -> np.ndarray:
    return images(1, number)


def images(n: int, first: int = 0) -> np.ndarray:
    return unique_images(n, (1, SIDE, SIDE), first)


def missing(gateway: Gateway, number: int) -> np.ndarray:
    return gateway._ledger.missing(content_hashes(gateway._asked["svc"], one(number)))


def test_a_server_that_dies_is_waited_for_and_refused_connections_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.05)
    server = FaultyService("die" if number % 11 == 5 else None for number in itertools.count())
    server.delay = 0.005
    with served(server) as url, Gateway(tmp_path / "l.sqlite", [service(url, batch=4)]) as gateway:
        assert np.array_equal(gateway.ask("svc", images(COUNT)), truth(range(COUNT)))
        spent = gateway.totals()["svc"]
        assert server.deaths >= 5
        assert spent.answered == COUNT <= server.received <= spent.sent
        assert spent.sent <= COUNT + server.deaths * 4 * 4  # a death costs what was on its way, and no more
