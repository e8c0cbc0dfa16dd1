"""One process at a time writes a run in an object store; who is dead is found out, and who lives is left alone."""

import json
import subprocess
import sys
import threading

import pytest

from ray_dfml import object_store
from ray_dfml.errors import ResourceError, UsageError
from ray_dfml.files import Uri
from ray_dfml.runtime import owner
from ray_dfml.runtime.owner import Owner


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody beats on its own, and nobody is waited for; tests beat for them."""
    monkeypatch.setattr(owner, "BEAT_SECONDS", 1e6)
    monkeypatch.setattr(owner, "DEAD_SECONDS", 0.0)


@pytest.fixture(params=["memory", "s3"])
def folder(request: pytest.FixtureRequest) -> Uri:
    """An empty folder of a store."""
    return request.getfixturevalue(f"{request.param}_folder")


def test_the_right_is_taken_and_given_back(folder: Uri) -> None:
    for _ in range(2):
        mine = Owner.claim(folder)
        mine.check()
        assert object_store.names(folder) == ["owner-000001.json"]
        mine.release()
        assert object_store.names(folder) == []


def test_of_all_who_want_a_run_one_gets_it(memory_folder: Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have seen that nobody owns it."""
    together = threading.Barrier(6, timeout=60)
    numbers = owner._numbers
    monkeypatch.setattr(owner, "_numbers", lambda uri: (numbers(uri), together.wait())[0])
    found: list[Owner | str] = []

    def want() -> None:
        try:
            found.append(Owner.claim(memory_folder))
        except UsageError as error:
            found.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [one for one in found if isinstance(one, Owner)]
    assert len(winners) == 1
    assert {one for one in found if isinstance(one, str)} == {
        f"{memory_folder}: another process has just begun to write this run; wait, or stop it"
    }
    monkeypatch.setattr(owner, "_numbers", numbers)
    winners[0].release()


def test_a_living_owner_is_left_alone(memory_folder: Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, said = Owner.claim(memory_folder), []

    def beat(_: float) -> None:
        mine._beats += 1
        object_store.write(memory_folder / "owner-000001.json", mine._text())

    monkeypatch.setattr(owner.time, "sleep", beat)
    with pytest.raises(UsageError, match="is writing this run; stop it first"):
        Owner.claim(memory_folder, said.append)
    assert len(said) == 1
    assert "has not said that it stopped" in said[0]
    mine.check()
    mine.release()


def test_a_silent_owner_loses_the_run(memory_folder: Uri) -> None:
    """It may be on another machine, so its silence is all that is known; and if it wakes up, it stops."""
    asleep, taken = Owner.claim(memory_folder), Owner.claim(memory_folder)
    taken.check()
    with pytest.raises(ResourceError, match="another process goes on with this run; this one stops"):
        asleep.check()
    asleep.release()
    taken.check()
    taken.release()


def test_an_owner_that_wakes_up_leaves_the_next_but_one_alone(memory_folder: Uri) -> None:
    """The numbers began again meanwhile, so it finds its own number there."""
    asleep, taken = Owner.claim(memory_folder), Owner.claim(memory_folder)
    taken.release()
    third = Owner.claim(memory_folder)
    assert object_store.names(memory_folder) == ["owner-000001.json"]
    with pytest.raises(ResourceError, match="another process goes on with this run"):
        asleep.check()
    asleep.release()
    third.check()
    third.release()


def test_an_owner_that_was_killed_here_is_not_waited_for(memory_folder: Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    file = memory_folder / "owner-000004.json"
    object_store.write(file, json.dumps({"host": "here", **owner._process(child.pid)}).encode())
    monkeypatch.setattr(owner.time, "sleep", lambda _: object_store.write(file, b'{"host": "here", "beats": 1}'))
    with pytest.raises(UsageError, match="of here is writing this run"):
        Owner.claim(memory_folder)
    object_store.write(file, json.dumps({"host": "here", **owner._process(child.pid)}).encode())
    child.kill()
    child.wait()
    monkeypatch.setattr(owner.time, "sleep", lambda _: pytest.fail("it waits for the dead"))
    mine = Owner.claim(memory_folder)
    assert object_store.names(memory_folder) == ["owner-000005.json"]
    mine.release()


def test_the_owner_beats(memory_folder: Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    beaten = threading.Event()
    write = object_store.write

    def noted(uri: Uri, data: bytes) -> None:
        write(uri, data)
        if json.loads(data)["beats"] == 3:
            beaten.set()

    monkeypatch.setattr(object_store, "write", noted)
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.001)
    mine = Owner.claim(memory_folder)
    assert beaten.wait(60)
    mine.release()
    assert object_store.names(memory_folder) == []


def test_a_store_that_creates_twice_is_refused(memory_folder: Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "create", object_store.write)
    with pytest.raises(ResourceError, match="creates a file twice, so two runs could mix there"):
        Owner.claim(memory_folder)
