"""What a stranger may hand over: each case ends in one line and the right exit code, and runs nothing of his.

Each case writes a harmful file, names the command that reads it, and says its exit code. The payloads would make a
file; a test that finds it has been run.
"""

import hashlib
import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ray_dfml.data.pool import Pool
from tests.data.pools import add, state
from tests.data.pools import edit as edit_entry
from tests.runtime import toy

Command = Callable[..., toy.Done]
Make = Callable[[Path], list[object]]
"""Prepares a case in an empty folder, and returns the words of the command."""

SECRET = "sk-1234567890abcdefghij"


class Payload:
    """When it is unpickled it makes the file `ran`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ran"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


def pickled(folder: Path) -> bytes:
    return pickle.dumps(Payload(folder))


def zipped(folder: Path) -> bytes:
    """As `torch.save` writes it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(folder))
        archive.writestr("archive/version", "3\n")
    return made.getvalue()


def array(folder: Path) -> bytes:
    """A NumPy file of objects, which is a pickle within."""
    made = io.BytesIO()
    np.save(made, np.array([Payload(folder)], dtype=object), allow_pickle=True)
    return made.getvalue()


def header(text: bytes, size: int | None = None) -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text


ONE_FLOAT = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'

TWO_FLOATS = ONE_FLOAT[:-1] + b"," + ONE_FLOAT[1:].replace(b'"a"', b'"b"')

BYTES: dict[str, Callable[[Path], bytes]] = {
    "a pickle": pickled,
    "a pickle of torch": zipped,
    "a pickle of numpy": array,
    "a header of 2^63 bytes": lambda _: header(b"{}", 2**63),
    "a header of 8 GiB": lambda _: header(b"{}", 2**33),
    "a header that is no JSON": lambda _: header(b"{" * 1000),
    "a header of deep lists": lambda _: header(b"[" * 100_000),
    "a header that names more bytes than there are": lambda _: header(ONE_FLOAT.replace(b"4]", b"4000]")),
    "a header whose parts overlap": lambda _: header(TWO_FLOATS) + b"0000",
    "a shape of 2^62": lambda _: header(ONE_FLOAT.replace(b"[1]", b"[4611686018427387904]")) + b"0000",
    "a negative shape": lambda _: header(ONE_FLOAT.replace(b"[1]", b"[-1]")) + b"0000",
    "an unknown dtype": lambda _: header(ONE_FLOAT.replace(b"F32", b"OBJ")) + b"0000",
    "nothing": lambda _: b"",
    "a web page": lambda _: b"<html>404</html>",
}  # fmt: skip
"""Files that are no weights."""


def pool(folder: Path) -> Pool:
    """A pool of one sound teacher, `a`."""
    made = Pool.create(folder / "pool")
    add(made, "a", state(0))
    return made


def train(folder: Path) -> list[object]:
    return ["train", "best-model", "--pool", folder / "pool", "--run-dir", folder / "run", "--backend", "local"]


def with_weights(content: Callable[[Path], bytes], *, true_hash: bool) -> Make:
    """The file of a teacher is another one; its sha256 in the manifest is right or wrong."""

    def make(folder: Path) -> list[object]:
        made, data = pool(folder), content(folder)
        (made.path / "weights" / "a.safetensors").write_bytes(data)
        if true_hash:
            edit_entry(made, sha256=hashlib.sha256(data).hexdigest())
        return train(folder)

    return make


def with_entry(**changes: Any) -> Make:
    def make(folder: Path) -> list[object]:
        edit_entry(pool(folder), **changes)
        return train(folder)

    return make


def with_manifest(text: str) -> Make:
    """`RAN` in the text stands for the file that must not be made."""

    def make(folder: Path) -> list[object]:
        (pool(folder).path / "pool.yaml").write_text(text.replace("RAN", str(folder / "ran")))
        return train(folder)

    return make


def added(content: Callable[[Path], bytes]) -> Make:
    def make(folder: Path) -> list[object]:
        (folder / "w.pt").write_bytes(content(folder))
        words = ["--weights", folder / "w.pt", "--arch", "conv4", "--input", "1x16x16", "--classes", "a,b,c"]
        return ["pool", "add", folder / "pool", *words]

    return make


def with_run(name: str, content: Callable[[Path], bytes], *words: object) -> Make:
    """A run folder, made before, in which one file is another."""

    def make(folder: Path) -> list[object]:
        (folder / "run" / name).write_bytes(content(folder))
        return [folder / "run" if word == "RUN" else word for word in words]

    return make


def text(value: str) -> Callable[[Path], bytes]:
    return lambda folder: value.replace("RAN", str(folder / "ran")).encode()


CODE = "!!python/object/apply:os.mknod [RAN]"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)  # fmt: skip
RESUME = ("train", "free", "--run-dir", "RUN", "--resume", "--backend", "local")
EVALUATE = ("evaluate", "RUN", "--data", "glyphs", "--episodes", 2)

POOLS: dict[str, Make] = {
    **{f"weights: {name}": with_weights(content, true_hash=True) for name, content in BYTES.items()},
    "weights: another hash": with_weights(lambda _: b"x", true_hash=False),
    **{f"added: {name}": added(content) for name, content in BYTES.items()},
    "id that climbs": with_entry(id="../../a"),
    "id that is a path": with_entry(id="/etc/passwd"),
    "id with a zero": with_entry(id="a\0b"),
    "weights that climb": with_entry(weights="../../../etc/passwd"),
    "weights at a path": with_entry(weights="/etc/passwd"),
    "weights at an address": with_entry(weights="http://127.0.0.1:1/a"),
    "architecture that is code": with_entry(arch="os:system"),
    "architecture that is a path": with_entry(arch="../evil.py"),
    "image of 10^9 pixels": with_entry(input={"channels": 1, "height": 10**9, "width": 1}),
    "a million classes": with_entry(classes=[f"c{i}" for i in range(10**5)]),
    "key in the entry": with_entry(api={"url": "https://x.invalid", "adapter": "oip", "key_env": SECRET}),
    "service by ftp": with_entry(api={"url": "ftp://x.invalid", "adapter": "oip"}),
    "service at a file": with_entry(api={"url": "file:///etc/passwd", "adapter": "oip"}),
    "service without TLS": with_entry(api={"url": "http://10.0.0.1", "adapter": "oip"}),
    "service with a password": with_entry(api={"url": f"https://me:{SECRET}@x.invalid", "adapter": "oip"}),
    "manifest with code": with_manifest(CODE),
    "manifest with code inside": with_manifest(f"version: 1\nteachers:\n- {CODE}\n"),
    "manifest that is a bomb": with_manifest(BOMB),
    "manifest that is a bomb of teachers": with_manifest(BOMB + "teachers: *j\n"),
    "manifest of deep lists": with_manifest("[" * 5000),
    "manifest that is a pickle": with_manifest("\x80\x04\x95"),
    "manifest that refers to itself": with_manifest("teachers: &a\n- *a\n"),
}  # fmt: skip

RUNS: dict[str, tuple[Make, int]] = {
    "config with code": (with_run("config.yaml", text(CODE), *RESUME), 3),
    "config that is a bomb": (with_run("config.yaml", text(BOMB), *RESUME), 3),
    "config of deep lists": (with_run("config.yaml", text("[" * 5000), *RESUME), 3),
    "status that is a pickle": (with_run("status.json", pickled, "status", "RUN"), 3),
    "learner that is a pickle": (with_run("learner.safetensors", pickled, *EVALUATE), 3),
    "learner that is a pickle of torch": (with_run("learner.safetensors", zipped, *EVALUATE), 3),
    "learner with a header of 8 GiB": (with_run("learner.safetensors", BYTES["a header of 8 GiB"], *EVALUATE), 3),
    "card that is a pickle": (with_run("learner.json", pickled, *EVALUATE), 3),
    "card of deep lists": (with_run("learner.json", text("[" * 100_000), *EVALUATE), 3),
    "a pickle beside the results": (with_run("tuner.pkl", pickled, "report", "RUN"), 0),
    "a pickle of the state beside the results": (with_run("checkpoints/state.pkl", pickled, "status", "RUN"), 0),
}  # fmt: skip

LINES: dict[str, tuple[list[str], int]] = {
    "a pool behind http": (["--pool", "http://127.0.0.1:1/pool"], 2),
    "a pool at a chain of addresses": (["--pool", "simplecache::http://127.0.0.1:1/pool"], 2),
    "a pool at a file address": (["--pool", "file:///etc"], 2),
    "a setting with code": (["--pool", "POOL", "--set", f"learner.way={CODE}"], 2),
    "a setting of deep lists": (["--pool", "POOL", "--set", "learner.way=" + "[" * 900], 2),
    "data at a path that climbs": (["--pool", "POOL", "--data", "folder:../../../../../etc/passwd"], 2),
}  # fmt: skip


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Callable[[toy.Done, int], None]]:
    """Checks how a command ended: its code, one line or none, no traceback, no secret, and nothing was run."""

    def check(done: toy.Done, code: int) -> None:
        assert not (tmp_path / "ran").exists(), "it was run"
        assert done.code == code, done.err
        assert done.err.count("\n") <= 1
        assert (code == 0) or done.err.startswith("ray-dfml: ")
        assert len(done.err) < 2000
        assert SECRET not in done.err + done.out
        assert "Traceback" not in done.err

    yield check
    assert not (tmp_path / "ran").exists()


def test_the_payload_would_run(tmp_path: Path) -> None:
    os.close(pickle.loads(pickled(tmp_path)))
    assert (tmp_path / "ran").exists()
    assert yaml.unsafe_load(CODE.replace("RAN", str(tmp_path / "too"))) is None
    assert (tmp_path / "too").exists()


def test_there_are_enough_cases() -> None:
    assert len(POOLS) + len(RUNS) + len(LINES) >= 50


@pytest.mark.parametrize("case", POOLS)
def test_a_hostile_pool(tmp_path: Path, command: Command, quiet: Callable[[toy.Done, int], None], case: str) -> None:
    quiet(command(*POOLS[case](tmp_path)), 3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", RUNS)
def test_a_hostile_run_folder(
    tmp_path: Path, free_run: Path, command: Command, quiet: Callable[[toy.Done, int], None], case: str
) -> None:
    shutil.copytree(free_run, tmp_path / "run")
    make, code = RUNS[case]
    quiet(command(*make(tmp_path)), code)


@pytest.mark.parametrize("case", LINES)
def test_a_hostile_line(tmp_path: Path, command: Command, quiet: Callable[[toy.Done, int], None], case: str) -> None:
    words, code = LINES[case]
    path = pool(tmp_path).path
    words = [str(path) if word == "POOL" else word.replace("RAN", str(tmp_path / "ran")) for word in words]
    quiet(command("train", "best-model", *words, "--run-dir", tmp_path / "run", "--backend", "local"), code)
    assert not (tmp_path / "run").exists()
