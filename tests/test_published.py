"""Versions of a folder: a reader sees a whole one at any moment, and a writer that dies at any call harms nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_dfml import object_store, published
from ray_dfml.errors import RejectedError, ResourceError, UsageError
from ray_dfml.files import Uri
from ray_dfml.published import Publisher
from tests.stores import Mortal

ROUNDS = 4


def write(folder: Path, r: int) -> None:
    """What a run leaves after round `r`: a status that is replaced, a log that grows, a checkpoint of the round."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"round": r}))
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(f"round {r}\n")
    (folder / f"checkpoints/{r}.safetensors").write_bytes(bytes([r]) * 100)
    (folder / f"checkpoints/{r - 2}.safetensors").unlink(missing_ok=True)
    for hidden in (".lock", "ledger.sqlite", "ledger.sqlite-wal"):
        (folder / hidden).touch()


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder that are published."""
    return {name: path.read_bytes() for name, path in published._files(folder)}


def check(uri: Uri, tmp_path: Path) -> int | None:
    """The round that a reader sees, after it has checked that all files are of this round."""
    if published.current(uri) is None:
        return None
    published.fetch(uri, copy := tmp_path / "copy" / str(len(list(tmp_path.glob("copy/*")))))
    r = json.loads((copy / "status.json").read_text())["round"]
    kept = {f"checkpoints/{n}.safetensors": bytes([n]) * 100 for n in (r - 1, r) if n >= 0}
    log = "".join(f"round {n}\n" for n in range(r + 1)).encode()
    assert contents(copy) == {"status.json": json.dumps({"round": r}).encode(), "metrics.jsonl": log, **kept}
    return r


def go_on(uri: Uri, folder: Path) -> None:
    """A writer that begins, or goes on after the round that is published, to the end."""
    version = published.current(uri)
    if version is not None:
        published.fetch(uri, folder)
    first = json.loads((folder / "status.json").read_text())["round"] + 1 if version else 0
    publisher = Publisher(uri, folder, version, lambda: None)
    for r in range(first, ROUNDS):
        write(folder, r)
        publisher.publish()


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_writer_may_die_at_any_call(
    late: bool, memory_folder: Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before or after each call of the store in turn, twice in a row, and a reader looks before and after."""
    mortal = Mortal(monkeypatch, late=late)
    calls = mortal.count(lambda: go_on(memory_folder / "whole", tmp_path / "whole"))
    assert calls > 4 * ROUNDS
    for n in range(calls):
        uri, seen = memory_folder / str(n), []
        for attempt, moment in enumerate((n, n % 7)):
            with mortal.dying(moment) as died:
                go_on(uri, tmp_path / f"{n}-{attempt}")
            seen.append(check(uri, tmp_path))
            assert died or seen[-1] == ROUNDS - 1
        go_on(uri, tmp_path / f"{n}-last")
        assert check(uri, tmp_path) == ROUNDS - 1
        assert [r or 0 for r in seen] == sorted(r or 0 for r in seen), "no round is lost again"
        assert contents(tmp_path / f"{n}-last") == contents(tmp_path / "whole")


def test_a_log_is_written_in_segments(memory_folder: Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "SEGMENTS", 3)
    publisher = Publisher(memory_folder, tmp_path, None, lambda: None)
    sizes = []
    for r in range(5):
        write(tmp_path, r)
        publisher.publish()
        version = published.current(memory_folder)
        assert version is not None
        sizes.append([segment.size for segment in version.files["metrics.jsonl"]])
    assert sizes == [[8], [8, 8], [8, 8, 8], [32], [32, 8]]


def test_what_is_not_needed_is_removed(memory_folder: Uri, tmp_path: Path) -> None:
    publisher = Publisher(memory_folder, tmp_path, None, lambda: None)
    for r in range(6):
        write(tmp_path, r)
        publisher.publish()
        before = object_store.below(memory_folder)
        publisher.publish()
        assert object_store.below(memory_folder) == before, "nothing changed, so nothing is written"
    assert sum(name.endswith("status.json") for name in before) == 2
    assert sum(name.endswith("version.json") for name in before) == 2
    assert sum(name.endswith(".safetensors") for name in before) == 3, "two of each version, one of which is in both"


def test_a_reader_whose_version_goes_begins_again(
    memory_folder: Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher(memory_folder, tmp_path / "run", None, lambda: None)
    write(tmp_path / "run", 0)
    publisher.publish()
    read, rounds = object_store.read, iter(range(1, ROUNDS))

    def overtaken(uri: Uri, **options: int) -> bytes:
        if uri.name == "status.json":
            for r in rounds:
                write(tmp_path / "run", r)
                publisher.publish()
        return read(uri, **options)

    monkeypatch.setattr(object_store, "read", overtaken)
    assert check(memory_folder, tmp_path) == ROUNDS - 1


def test_a_version_that_may_not_be_stays_out(memory_folder: Uri, tmp_path: Path) -> None:
    allowed = [True]

    def may() -> None:
        if not allowed[0]:
            raise ResourceError("another process goes on with this run")

    publisher = Publisher(memory_folder, tmp_path / "run", None, may)
    write(tmp_path / "run", 0)
    publisher.publish()
    allowed[0] = False
    write(tmp_path / "run", 1)
    with pytest.raises(ResourceError):
        publisher.publish()
    assert check(memory_folder, tmp_path) == 0
    allowed[0] = True
    publisher.publish()
    assert check(memory_folder, tmp_path) == 1, "what the failed attempt wrote is not taken for the new version"


def test_a_version_that_comes_late_is_whole(
    memory_folder: Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is interrupted while its `latest.json` is on the way, which arrives after that of the next version."""
    publisher = Publisher(memory_folder, tmp_path / "run", None, lambda: None)
    write(tmp_path / "run", 0)
    publisher.publish()
    put, late = object_store.write, []

    def interrupted(uri: Uri, data: bytes) -> None:
        if uri.name == "latest.json":
            late.append((uri, data))
            raise KeyboardInterrupt
        put(uri, data)

    write(tmp_path / "run", 1)
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publisher.publish()
    write(tmp_path / "run", 2)
    publisher.publish()
    assert check(memory_folder, tmp_path) == 2
    object_store.write(*late[0])
    assert check(memory_folder, tmp_path) == 1


def test_a_writer_that_wakes_up_replaces_nothing(memory_folder: Uri, tmp_path: Path) -> None:
    """It was taken for dead before it began a version, and finds out only when its objects are there."""

    def lost() -> None:
        raise ResourceError("another process goes on with this run")

    asleep = Publisher(memory_folder, tmp_path / "asleep", None, lost)
    write(tmp_path / "asleep", 0)
    go_on(memory_folder, tmp_path / "run")
    write(tmp_path / "asleep", 1)
    with pytest.raises(ResourceError):
        asleep.publish()
    assert check(memory_folder, tmp_path) == ROUNDS - 1


def other(name: str) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(b"status.json", name.encode())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("latest.json", lambda data: data[:-5], "latest.json: not what this program writes"),
        ("latest.json", lambda data: data.replace(b"000000", b"../../"), "leaves the folder"),
        ("latest.json", lambda data: b"[" * 100_000, "latest.json: not what this program writes"),
        ("version.json", lambda data: data + b" ", "version.json: is not the object"),
        ("version.json", other("statut.json"), "version.json: is not the object that was written"),
        ("status.json", lambda data: b"x" * len(data), "status.json: is not the object that was written"),
    ],
)
def test_what_was_changed_is_refused(
    name: str, change: Callable[[bytes], bytes], said: str, memory_folder: Uri, tmp_path: Path
) -> None:
    write(tmp_path / "run", 0)
    Publisher(memory_folder, tmp_path / "run", None, lambda: None).publish()
    file = next(memory_folder / one for one in object_store.below(memory_folder) if one.endswith(name))
    object_store.write(file, change(object_store.read(file)))
    with pytest.raises(RejectedError, match=said):
        published.fetch(memory_folder, tmp_path / "copy")
    assert not (tmp_path / "copy" / "status.json").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"../up": []}, "'../up' leaves the folder"),
        ({"ledger.sqlite": []}, r"'ledger\.sqlite' never leaves its machine"),
        ({"checkpoints/.x.tmp": []}, "never leaves its machine"),
        ({"a": [["../../up", 0, ""]]}, "'../../up' leaves the folder"),
        ({"a": [[5, 0]]}, "latest.json: not what this program writes"),
        ({"a": 5}, "latest.json: not what this program writes"),
        (["a"], "latest.json: not what this program writes"),
    ],
)
def test_a_list_that_this_program_does_not_write_is_refused(
    files: object, said: str, memory_folder: Uri, tmp_path: Path
) -> None:
    publisher = Publisher(memory_folder, tmp_path, None, lambda: None)
    here = publisher._put("a/version.json", json.dumps({"format": 1, "files": files}).encode())
    object_store.write(memory_folder / "latest.json", json.dumps(here._asdict()).encode())
    with pytest.raises(RejectedError, match=said):
        published.fetch(memory_folder, tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_is_published(memory_folder: Uri) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        published.local(memory_folder)
    assert not published.exists(memory_folder)
