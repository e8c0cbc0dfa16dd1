"""URIs as people write them, and files in object stores: in memory and in S3."""

import os
import threading
import time
from pathlib import Path

import pytest

from ray_dfml import object_store
from ray_dfml.errors import RejectedError, ResourceError, UsageError
from ray_dfml.files import Uri, located, resolved


def test_a_uri_has_one_spelling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BUCKET", "birds")
    assert located("S3://$BUCKET/pools/a/") == Uri("s3://birds/pools/a")
    assert located("abfs://box@account.dfs.core.windows.net/a") / "b" == "abfs://box@account.dfs.core.windows.net/a/b"
    assert located(f"file://{tmp_path}") == located(f"file://localhost{tmp_path}") == located(tmp_path) == tmp_path
    assert (Uri("s3://b/x.parquet").name, Uri("s3://b/x.parquet").suffix) == ("x.parquet", ".parquet")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://host/pool", "http is no object store of this program; known: s3"),
        ("gss://b/pool", r"gss is no object store of this program \(did you mean 'gs'\?\)"),
        ("simplecache::s3://b/pool", "simplecache is no object store"),
        ("s3://", "expected s3://BUCKET/NAME"),
        ("s3://b/../c", "without '\\?', '..' and empty names"),
        ("s3://b//c", "without '\\?', '..' and empty names"),
        ("s3://b/c?versionId=1", "without '\\?', '..' and empty names"),
        ("s3://b/a\nb", "without '\\?', '..' and empty names"),
        ("s3://$NOWHERE_AT_ALL/c", "the variable NOWHERE_AT_ALL is not set"),
        ("file://host/x", "names a machine or a relative path; write file:///FOLDER/NAME"),
        ("file://x", "names a machine or a relative path"),
    ],
)
def test_what_is_no_uri_of_a_store_is_refused(uri: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        located(uri)


def test_a_key_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="a key never stands in a URI") as refused:
        located("s3://AKIA:hush@bucket/pool")
    assert "hush" not in str(refused.value)


def test_a_path_is_needed_where_things_are_written() -> None:
    with pytest.raises(UsageError, match=r"^s3://b/pool: a path on a disk is needed here"):
        resolved("s3://b/pool")


@pytest.fixture(params=["memory", "s3"])
def folder(request: pytest.FixtureRequest) -> Uri:
    """An empty folder of a store."""
    return request.getfixturevalue(f"{request.param}_folder")


def test_files_are_put_read_listed_and_removed(folder: Uri) -> None:
    assert object_store.names(folder) == []
    assert not object_store.exists(folder / "a")
    object_store.write(folder / "a", b"one")
    object_store.write(folder / "a", b"two")
    object_store.write(folder / "b/c", b"")
    assert object_store.exists(folder / "a")
    assert object_store.read(folder / "a", most=3) == b"two"
    assert object_store.names(folder) == ["a", "b"]
    with pytest.raises(RejectedError, match=r"^3 bytes, more than the limit of 2$"):
        object_store.read(folder / "a", most=2)
    for _ in range(2):
        object_store.remove(folder / "a")
    assert object_store.names(folder) == ["b"]
    with pytest.raises(FileNotFoundError, match="no such file or folder") as missing:
        object_store.read(folder / "a")
    assert missing.value.filename == folder / "a"


def test_of_all_who_create_a_file_one_succeeds(folder: Uri) -> None:
    won: list[int] = []

    def race(number: int) -> None:
        try:
            object_store.create(folder / "owner", str(number).encode())
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert object_store.read(folder / "owner") == str(won[0]).encode()


def test_a_copy_is_fetched_once_for_each_state(folder: Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    object_store.write(folder / "x/1", b"one")
    object_store.write(folder / "x/y/2", b"two")
    copy = object_store.fetch(folder / "x", tmp_path)
    assert {str(p.relative_to(copy)): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == {
        "1": b"one", "y/2": b"two"
    }  # fmt: skip
    assert object_store.fetch(folder / "x/1", tmp_path).read_bytes() == b"one"
    (copy / "1").write_bytes(b"ours")
    assert (object_store.fetch(folder / "x", tmp_path) / "1").read_bytes() == b"ours", "it is not fetched again"
    object_store.write(folder / "x/1", b"other")
    assert (object_store.fetch(folder / "x", tmp_path) / "1").read_bytes() == b"other"
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    with pytest.raises(FileNotFoundError):
        object_store.fetch(folder / "z", tmp_path)


def test_a_name_that_leaves_the_folder_is_refused(memory_folder: Uri, tmp_path: Path) -> None:
    store = object_store._of(memory_folder)
    store.store[f"{store._strip_protocol(memory_folder)}/../up"] = store.open(memory_folder / "f", "wb")
    with pytest.raises(RejectedError, match="leaves the folder"):
        object_store.fetch(memory_folder, tmp_path / "c")
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


def test_what_a_store_says_no_with_names_the_file(s3_folder: Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    nobodys = Uri("s3://nobodys-bucket/x")
    with pytest.raises(FileNotFoundError, match=r"bucket does not exist.*s3://nobodys-bucket/x"):
        object_store.write(nobodys, b"")

    class Away:
        def cat_file(self, uri: str) -> bytes:
            raise LookupError(f"no credentials\nfor {uri}")

    monkeypatch.setattr(object_store, "_of", lambda uri: Away())
    with pytest.raises(OSError, match=r"^\[Errno 5\] no credentials for s3://b/x: 's3://b/x'$"):
        object_store.read(Uri("s3://b/x"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(ResourceError, match=r"^gs:// needs a package that is not here: pip install gcsfs$"):
        object_store.read(Uri("gs://b/x"))


def test_copies_that_nobody_uses_go_when_the_disk_would_fill(
    memory_folder: Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest first; one that was asked for today stays, however full it is, and so does the newest."""
    monkeypatch.setattr(object_store, "FETCHED_BYTES", 400)
    copies = {}
    for name in "abcd":
        object_store.write(memory_folder / name, name.encode() * 100)
        copies[name] = object_store.fetch(memory_folder / name, tmp_path)
    assert all(copy.exists() for copy in copies.values()), "all were asked for today"
    now = time.time()
    for name, days in {"a": 3, "b": 2, "c": 1.5}.items():
        os.utime(copies[name].parent, (now - 86_400 * days,) * 2)
    (tmp_path / "left.part").mkdir()
    os.utime(tmp_path / "left.part", (now - 86_400 * 2,) * 2)
    object_store.fetch(memory_folder / "a", tmp_path)
    object_store.write(memory_folder / "e", b"e" * 100)
    copies["e"] = object_store.fetch(memory_folder / "e", tmp_path)
    assert [name for name, copy in copies.items() if copy.exists()] == ["a", "c", "d", "e"]
    assert not (tmp_path / "left.part").exists()
