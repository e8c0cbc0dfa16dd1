"""Small image sources made on the spot; the cache of decoded arrays lives in a temporary folder."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_dfml.data import datasets


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """One cache for all tests of this folder, so that glyphs are drawn once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_DFML_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def fresh_load():
    yield
    datasets._load.cache_clear()


def _encode(pixels: np.ndarray, encoding: str) -> bytes:
    """Bytes of one image, uint8 [h, w, c]."""
    if encoding not in ("png", "jpeg"):
        return pixels.tobytes()
    stream = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(stream, encoding)
    return stream.getvalue()


@pytest.fixture(scope="session")
def write_parquet() -> Callable[..., str]:
    """write(path, pixels uint8 [n, h, w, c], names, ...) -> path as str; `columns` and `meta` replace its own."""

    def write(
        path: Path,
        pixels: np.ndarray,
        names: Sequence[str],
        *,
        splits: Sequence[str] | None = None,
        encoding: str = "raw_uint8_hwc",
        columns: dict[str, Any] | None = None,
        meta: dict[str, str | None] | None = None,
    ) -> str:
        index = {name: i for i, name in enumerate(sorted(set(names)))}
        table: dict[str, Any] = {
            "image": pa.array([_encode(p, encoding) for p in pixels], pa.binary()),
            "label": pa.array([index[n] for n in names], pa.int32()),
            "label_name": pa.array(list(names), pa.string()),
        }
        if splits is not None:
            table["split"] = pa.array(list(splits), pa.string())
        table = {k: v for k, v in {**table, **(columns or {})}.items() if v is not None}
        height, width, channels = pixels.shape[1:]
        facts = {"height": str(height), "width": str(width), "channels": str(channels), "encoding": encoding}
        facts = {k: v for k, v in {**facts, "licence": "CC0", **(meta or {})}.items() if v is not None}
        pq.write_table(pa.table(table).replace_schema_metadata(facts), path)
        return str(path)

    return write


@pytest.fixture(scope="session")
def noise() -> Callable[..., np.ndarray]:
    """noise(n, h, w, c) -> uint8 pixels, the same every time."""
    return lambda *shape: np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="session")
def write_folder() -> Callable[..., str]:
    """write(root, {"class/or/split/class": [uint8 [h, w] or [h, w, 3], ...]}) -> root as str."""

    def write(root: Path, tree: dict[str, Sequence[np.ndarray]]) -> str:
        for folder, images in tree.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for number, pixels in enumerate(images):
                Image.fromarray(pixels).save(root / folder / f"{number:03d}.png")
        return str(root)

    return write
