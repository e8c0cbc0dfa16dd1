"""`pool add --api`: one probe that is charged, and bad input in one line with nothing sent and nothing saved."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from ray_dfml.data.pool import Pool
from tests.data.pools import two_teachers
from tests.runtime import toy
from tests.services.faulty import KEY, FaultyService, served

Command = Callable[..., toy.Done]


@pytest.fixture
def server() -> FaultyService:
    return FaultyService()


@pytest.fixture
def url(server: FaultyService) -> Iterator[str]:
    with served(server) as address:
        yield address


def words(pool: Path, url: str, **changes: object) -> list[str]:
    """A sound command line, with other values of some options; None leaves one out."""
    options: dict[str, object] = {
        "api": url, "adapter": "oip", "model": "m", "output": "answer", "access": "probs", "input": "1x4x4",
        "classes": "a,b,c", "authorization": "J. Doe, owner",
    } | changes  # fmt: skip
    flat = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return ["pool", "add", str(pool), *(word for pair in flat for word in pair)]


def test_a_service_joins_after_one_probe(tmp_path: Path, server: FaultyService, url: str, command: Command) -> None:
    """The entry holds what the probe found out and the terms; the key is only named."""
    pool = tmp_path / "pool"
    more = {"price": 0.25, "budget": 1000, "rate": 50, "concurrency": 2, "batch": 20}
    done = command(*words(pool, url, **more), "--json")
    assert (done.code, json.loads(done.out)) == (0, {"pool": str(pool), "id": "m"}), done.err
    assert "the probe sent 1 image, cost 0.25" in done.err
    assert server.received == 1
    entry = Pool.open(pool).entry("m")
    assert (entry.access, entry.price, entry.budget, entry.authorization) == ("probs", 0.25, 1000, "J. Doe, owner")
    assert entry.api is not None
    assert (entry.api.input, entry.api.binary, entry.api.rate, entry.api.concurrency) == ("pixels", "on", 50, 2)


def test_the_file_says_what_was_said_and_found_out_and_nothing_else(
    tmp_path: Path, url: str, command: Command
) -> None:  # fmt: skip
    pool = tmp_path / "pool"
    assert command(*words(pool, url, price=0.25)).code == 0
    assert yaml.safe_load((pool / "pool.yaml").read_text())["teachers"] == [{
        "id": "m", "access": "probs", "input": {"channels": 1, "height": 4, "width": 4}, "classes": ["a", "b", "c"],
        "authorization": "J. Doe, owner", "price": 0.25,
        "api": {
            "url": url, "adapter": "oip", "model": "m", "output": "answer", "input": "pixels", "datatype": "FP32",
            "binary": "on",
        },
    }]  # fmt: skip
    before = Pool.open(pool).entry("m")
    assert command(*words(pool, url, id="n", batch=7)).code == 0
    assert Pool.open(pool).entry("m") == before


def test_a_key_is_sent_and_stands_nowhere(
    tmp_path: Path, server: FaultyService, url: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIGITS_KEY", KEY)
    done = command(*words(tmp_path / "pool", url, key_env="DIGITS_KEY"))
    assert done.code == 0, done.err
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    assert not [file for file in (tmp_path / "pool").rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"classes": "a,b,a"}, 2, "classes: class 'a' appears twice"),
        ({"budget": 0}, 2, "budget: input should be greater than or equal to 1, got 0"),
        ({"budget": 9, "batch": 10}, 2, "budget: 9 is below one batch of 10 images"),
        ({"key_env": "sk-very-secret"}, 2, "api.key_env: expected the name of an environment variable"),
        ({"key_env": "NO_SUCH_KEY"}, 2, "NO_SUCH_KEY"),
        ({"api": "http://example.org"}, 2, "api.url: http to example.org would send images and key in the open"),
        ({"output": "logits"}, 3, "output"),
        ({"output": None}, 2, "api: adapter oip needs model and output"),
        ({"access": None}, 2, "--access: say what the service answers"),
        ({"access": "weights"}, 2, "api: a service gives logits, probs or label"),
        ({"arch": "conv4"}, 2, "--arch: a service tells no architecture"),
        ({"authorization": None}, 2, "authorization: say who permits"),
        ({"input": "4x4"}, 2, "expected CHANNELSxHEIGHTxWIDTH"),
        ({"input": "1x5x4"}, 3, "the entry says 1x5x4"),
        ({"decimals": 2, "access": "label"}, 2, "decimals: for access 'probs' only"),
        ({"model": "a model"}, 2, "id: 'a model': an id has letters"),
        ({"accuracy": 0.9}, 2, "give percent"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_nothing_is_sent(
    tmp_path: Path, server: FaultyService, url: str, command: Command, changes: dict[str, object], code: int, said: str
) -> None:
    pool = tmp_path / "pool"
    done = command(*words(pool, url, **changes))
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), done.err
    assert said in done.err
    assert "very-secret" not in done.err
    assert server.received == 0
    assert not pool.exists()


def test_what_a_service_answers_is_checked_before_it_joins(
    tmp_path: Path, server: FaultyService, url: str, command: Command
) -> None:
    """What was sent is in the ledger of the pool, and no teacher is."""
    server.faults = iter(["classes"])
    server.description["outputs"] = []
    done = command(*words(tmp_path / "pool", url))
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "4" in done.err
    assert server.received == 1
    assert (tmp_path / "pool" / ".probes.sqlite").exists()
    assert not (tmp_path / "pool" / "pool.yaml").exists()
    assert command(*words(tmp_path / "pool", url)).code == 0


def test_an_unreachable_host(tmp_path: Path, command: Command) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = command(*words(tmp_path / "pool", address))
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert not (tmp_path / "pool").exists()


def test_a_taken_id_is_refused_before_the_probe(
    tmp_path: Path, server: FaultyService, url: str, command: Command
) -> None:
    pool = two_teachers(tmp_path / "pool")
    done = command(*words(pool.path, url, id="a"))
    assert (done.code, server.received) == (2, 0)
    assert "id 'a' is taken" in done.err


def test_a_check_asks_a_service_only_if_told(tmp_path: Path, server: FaultyService, url: str, command: Command) -> None:
    pool = two_teachers(tmp_path / "pool")
    assert command(*words(pool.path, url, price=0.5)).code == 0
    quiet = command("pool", "check", pool.path)
    assert (quiet.code, server.received) == (0, 1)
    assert "m                                ok  a service, which was not asked" in quiet.out
    asked = command("pool", "check", pool.path, "--ask", "--json")
    assert (asked.code, server.received) == (0, 2)
    row = json.loads(asked.out)[2]
    assert [one["kind"] for one in row.pop("findings")] == ["service"]
    assert row == {"id": "m", "ok": True, "reason": "asked 1 image, cost 0.5"}
    server.faults = iter(["nan"])
    bad = command("pool", "check", pool.path, "--ask")
    assert (bad.code, server.received) == (3, 3)
    assert "REJECTED  answers NaN or infinite numbers" in bad.out


def test_weights_may_be_closed(tmp_path: Path, command: Command) -> None:
    """`--access` of weights wraps them; options of a service do not go with them."""
    made = two_teachers(tmp_path / "made").path / "weights" / "a.safetensors"
    line = ["pool", "add", tmp_path / "pool", "--weights", made, "--input", "1x16x16", "--classes", "a,b,c"]
    line += ["--mean", "0.4", "--std", "0.3", "--arch", "conv4"]
    done = command(*line, "--access", "probs", "--decimals", "3", "--price", "0.1", "--budget", "50")
    assert done.code == 0, done.err
    entry = Pool.open(tmp_path / "pool").entry("a")
    assert (entry.access, entry.decimals, entry.price, entry.budget, entry.card.arch) == ("probs", 3, 0.1, 50, "")
    for wrong, said in (
        (["--id", "b", "--model", "m"], "--model: is of services"),
        (["--id", "b", "--top-k", "0"], "top_k: input should be greater"),
        (["--id", "b", "--api", "https://x"], "either the weights"),
    ):
        refused = command(*line, *wrong)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert said in refused.err
