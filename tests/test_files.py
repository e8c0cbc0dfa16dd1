"""One rule for paths: expanded once, absolute, the same for every way in."""

import os
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml import Learner, Pool, train
from ray_dfml.cli import cli
from ray_dfml.config import resolve
from ray_dfml.data import cache, specs
from ray_dfml.errors import UsageError
from ray_dfml.files import is_readable, naming, resolved, shown
from tests.cli.test_commands import leaves
from tests.support import PROPERTY


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, a variable that names it, and a working folder beside it."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize("written", ["~/a/b", "$PLACE/a/b", "${PLACE}/a/b", "../home/a/b", "$PLACE/./c/../a/b"])
def test_a_path_means_one_place(home: Path, written: str) -> None:
    assert resolved(written) == home / "a" / "b"
    assert resolved(Path(written)) == home / "a" / "b"
    assert resolved(resolved(written)) == home / "a" / "b"


def test_a_dollar_in_a_name_that_exists_is_a_letter(home: Path) -> None:
    work = Path.cwd()
    (work / "a$PLACE").mkdir()
    assert resolved("a$PLACE") == work / "a$PLACE"
    assert resolved("a$PLACE/new") == work / "a$PLACE" / "new"
    assert resolved("./~") == work / "~"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("$NOT_SET_AT_ALL/x", "the variable NOT_SET_AT_ALL is not set"),
        ("~nobody-of-this-name/x", "no home folder of ~nobody-of-this-name"),
        ("", "a path is empty"),
        ("caf\udce9/x", r"caf\\xe9/x: this path is not UTF-8"),
    ],
)
def test_a_path_that_cannot_be_meant(home: Path, written: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolved(written)


def test_a_link_stays_the_place_that_was_named(home: Path) -> None:
    (home / "link").symlink_to("elsewhere")
    assert resolved("~/link") == home / "link"


def test_python_expands_what_the_command_line_does(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pool.create("~/pool")
    assert Pool.open("$PLACE/pool").path == home / "pool"
    with pytest.raises(UsageError, match=f"^{home}/none/learner.safetensors|^{home}/none: no such file"):
        Learner.load("~/none")
    with pytest.raises(UsageError, match=f"^{home}/none: no pool here"):
        train("average", pool="~/none", run_dir="~/run")
    (home / "run").mkdir()
    with pytest.raises(UsageError, match=f"^{home}/run: exists already"):
        train("random", data="glyphs", run_dir="~/run")
    monkeypatch.setenv("RAY_DFML_CACHE", "~/kept")
    assert cache.folder() == home / "kept"


def test_a_configuration_holds_absolute_paths(home: Path) -> None:
    config = resolve("free", pool=("~/pool", "here"), data=("folder:$PLACE/x", "glyphs", "folder:y"))
    work = Path.cwd()
    assert config.pool == (str(home / "pool"), str(work / "here"))
    assert config.data == (f"folder:{home}/x", "glyphs", f"folder:{work}/y")


def test_a_spec_is_one_place_whatever_the_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = specs.absolute("parquet:~/x.parquet")
    monkeypatch.chdir("/")
    assert specs.absolute(spec) == spec == f"parquet:{home}/x.parquet"


@pytest.mark.parametrize("words", list(leaves(cli)), ids=" ".join)
def test_no_command_has_a_path_of_another_kind(words: tuple[str, ...]) -> None:
    leaf: click.Command = cli
    for word in words:
        assert isinstance(leaf, click.Group)
        found = leaf.get_command(click.Context(leaf), word)
        assert found is not None
        leaf = found
    assert [option.name for option in leaf.params if isinstance(option.type, click.Path | click.File)] == []


@PROPERTY
@given(st.binary(max_size=12))
def test_any_name_can_be_shown(name: bytes) -> None:
    text = shown(os.fsdecode(name))
    assert text.encode("utf-8").decode("utf-8") == text
    assert is_readable(text)


def test_what_is_shown_can_be_read() -> None:
    assert shown("caf\udce9 日本\u3000語\n.png") == "caf\\xe9 日本\u3000語\\n.png"
    assert is_readable("red\u00a0fox می\u200cخواهم 日本\u3000語")
    assert not any(map(is_readable, ("a\nb", "a\tb", "\u202eb", "a\u2028b", "\udce9")))


def test_an_error_of_the_disk_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device: '/there'"), naming(Path("/there")):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="'/here'"), naming(Path("/there")):
        raise OSError(28, "No space left on device", "/here")
