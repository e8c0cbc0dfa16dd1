import os
import sys

import numpy as np
import pytest

from ray_dfml.data import cache

CONTENT = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_DFML_CACHE", str(tmp_path / "own"))
    return tmp_path / "own"


def fail():
    raise AssertionError("built again")


def test_second_read_comes_from_the_file(own_cache):
    first = cache.array("k", CONTENT.shape, lambda: CONTENT)
    second = cache.array("k", CONTENT.shape, fail)
    np.testing.assert_array_equal(first, CONTENT)
    np.testing.assert_array_equal(second, CONTENT)
    assert [p.name for p in own_cache.iterdir()] == ["k.npy"]


def test_writing_into_the_result_leaves_the_file_alone(own_cache):
    cache.array("k", CONTENT.shape, lambda: CONTENT)[:] = 0
    np.testing.assert_array_equal(cache.array("k", CONTENT.shape, fail), CONTENT)


@pytest.mark.parametrize("damage", ["empty", "text", "short", "pickle", "shape", "dtype", "zip"])
def test_a_broken_file_is_rebuilt(own_cache, damage):
    own_cache.mkdir()
    path = own_cache / "k.npy"
    np.save(path, CONTENT)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not an array")
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif damage == "shape":
        np.save(path, CONTENT[:1])
    elif damage == "dtype":
        np.save(path, CONTENT.astype(np.int16))
    else:
        path.write_bytes(b"PK\x03\x04 not a zip file")
    np.testing.assert_array_equal(cache.array("k", CONTENT.shape, lambda: CONTENT), CONTENT)
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), CONTENT)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RAY_DFML_CACHE", str(tmp_path / "file" / "below"))
    np.testing.assert_array_equal(cache.array("k", CONTENT.shape, lambda: CONTENT), CONTENT)


def test_a_failed_write_leaves_no_part_behind(own_cache, monkeypatch):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    np.testing.assert_array_equal(cache.array("k", CONTENT.shape, lambda: CONTENT), CONTENT)
    assert list(own_cache.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="home is found otherwise there")
def test_default_folder_is_under_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_DFML_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "ray-dfml"
    monkeypatch.setenv("RAY_DFML_CACHE", "~/elsewhere")
    assert cache.folder() == tmp_path / "elsewhere"
