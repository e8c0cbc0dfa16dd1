"""The table `Raw` that every reader of images returns, and the reader of Parquet files.

Every reader checks what it reads and raises RejectedError with one line: what is wrong, where, and what to do.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_dfml.data import images, mistaken
from ray_dfml.data.listing import check_class_name, split_of
from ray_dfml.errors import RejectedError

ENCODINGS = ("raw_uint8_hwc", "png", "jpeg")


@dataclass(frozen=True, kw_only=True)
class Raw:
    """What a reader found, with one row per image. No rule for splits has been applied yet."""

    images: np.ndarray
    """uint8 [n, c, h, w]"""
    names: np.ndarray
    """class name of each image, str [n]"""
    splits: np.ndarray | None
    """"train", "val" or "test" of each image, str [n]; None where the source has no splits"""
    source: Mapping[str, str]
    """path, format, md5 or pixels_md5, licence, citation, ..."""
    notes: tuple[str, ...] = ()
    """what a reader must know of how it was read, one line each"""


def file_md5(path: Path) -> str:
    """Hex md5 of a file's bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pixels_md5(pixels: np.ndarray, names: np.ndarray) -> str:
    """Hex md5 of decoded pixels and class names, in order. It identifies a source of many files on any machine."""
    digest = hashlib.md5("\n".join(names.tolist()).encode(), usedforsecurity=False)
    for start in range(0, len(pixels), 4096):
        digest.update(np.ascontiguousarray(pixels[start : start + 4096]).data)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- parquet


def read_parquet(path: Path, *, background: str = "white") -> Raw:
    """Read a Parquet file with columns `image label label_name` and, if it has splits, `split`.

    Its schema metadata give `height width channels encoding`, where `encoding` is raw_uint8_hwc, png or jpeg. Png and
    jpeg images are decoded as in `images.decode` and cached by the file's md5. Raises RejectedError.
    """
    table, meta = _open_parquet(path)
    height, width, channels = (_positive(path, meta, key) for key in ("height", "width", "channels"))
    encoding = meta.get("encoding", "")
    if encoding not in ENCODINGS:
        raise RejectedError(f"{path}: unknown encoding {encoding!r} in the schema metadata; use {', '.join(ENCODINGS)}")
    if channels not in (1, 3):
        raise RejectedError(f"{path}: {channels} channels; images must be grey (1) or RGB (3)")
    names = _names(path, table)
    splits = None
    if "split" in table.column_names:
        splits = _split_names(path, table["split"].to_pylist())
    shape = (channels, height, width)
    md5 = file_md5(path)
    if encoding == "raw_uint8_hwc":
        pixels, notes = _raw_images(path, table["image"], shape), []
    else:
        pixels, notes = _decoded_column(path, md5, table["image"], shape, background)
    kept = ("licence", "citation", "source_repository", "source_commit", "processing", "polarity")
    source = {"path": str(path), "format": "parquet", "md5": md5, **{k: meta[k] for k in kept if k in meta}}
    return Raw(images=pixels, names=names, splits=splits, source=source, notes=tuple(notes))


def _open_parquet(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """The table and its schema metadata, checked for columns, their types, nulls and rows."""
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        meta = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = mistaken.what_it_is(path) or (
            f"not a readable parquet file, perhaps cut short ({images.one_line(error)}); copy it again"
        )
        raise RejectedError(f"{path}: {said}") from None
    wanted: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
        "image": ("binary", lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t)),
        "label": ("integer", pa.types.is_integer),
        "label_name": ("string", lambda t: pa.types.is_string(t) or pa.types.is_large_string(t)),
        "split": ("string", lambda t: pa.types.is_string(t) or pa.types.is_large_string(t)),
    }
    missing = [c for c in wanted if c not in table.column_names and c != "split"]
    if missing:
        raise RejectedError(
            f"{path}: no column {', '.join(missing)} (found {', '.join(table.column_names) or 'none'}); "
            "write image, label, label_name and split"
        )
    for column, (kind, accepts) in wanted.items():
        if table.column_names.count(column) > 1:
            raise RejectedError(f"{path}: column {column} is there twice; keep one")
        if column not in table.column_names:
            continue
        if not accepts(table.schema.field(column).type):
            raise RejectedError(
                f"{path}: column {column} is {table.schema.field(column).type}; write it again as {kind}"
            )
        if table[column].null_count:
            row = table[column].is_null().to_pylist().index(True)
            raise RejectedError(f"{path}: column {column} is empty in row {row}; fill it or drop the row")
    if not table.num_rows:
        raise RejectedError(f"{path}: no rows; write at least one image")
    return table, meta


def _positive(path: Path, meta: Mapping[str, str], key: str) -> int:
    if key not in meta:
        raise RejectedError(f"{path}: schema metadata lack {key}; write height, width, channels and encoding")
    if not meta[key].isdecimal() or int(meta[key]) < 1:
        raise RejectedError(f"{path}: schema metadata {key} is {meta[key]!r}; write a whole number above 0")
    return int(meta[key])


def _names(path: Path, table: pa.Table) -> np.ndarray:
    """The label_name of every row. Labels and names must match one to one."""
    pairs = table.select(["label", "label_name"]).group_by(["label", "label_name"]).aggregate([]).to_pylist()
    name_of: dict[int, str] = {}
    label_of: dict[str, int] = {}
    for pair in sorted(pairs, key=lambda p: (p["label"], p["label_name"])):
        label, name = pair["label"], check_class_name(str(path), pair["label_name"])
        if name_of.setdefault(label, name) != name:
            raise RejectedError(
                f"{path}: label {label} is both {name_of[label]!r} and {name!r}; give each label one name"
            )
        if label_of.setdefault(name, label) != label:
            raise RejectedError(f"{path}: {name!r} is label {label_of[name]} and {label}; give each name one label")
    return np.array(table["label_name"].to_pylist(), dtype=np.str_)


def _split_names(path: Path, found: Sequence[str]) -> np.ndarray:
    meant = {word: split_of(word) for word in sorted(set(found))}
    for word, split in meant.items():
        if split is None:
            raise RejectedError(f"{path}: unknown split {word!r}; use train, val and test")
    return np.array([meant[word] for word in found], dtype=np.str_)


def _raw_images(path: Path, column: pa.ChunkedArray, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [n, c, h, w] of a column of h*w*c bytes each, row-major with channels last."""
    channels, height, width = shape
    wanted = height * width * channels
    out = np.empty((len(column), *shape), dtype=np.uint8)
    start = 0
    for chunk in column.chunks:
        values = chunk.cast(pa.large_binary())
        offsets = np.frombuffer(values.buffers()[1], dtype=np.int64)[values.offset : values.offset + len(values) + 1]
        lengths = np.diff(offsets)
        if (lengths != wanted).any():
            row = int(np.flatnonzero(lengths != wanted)[0])
            raise RejectedError(
                f"{path}: image in row {start + row} has {lengths[row]} bytes, "
                f"{height}x{width}x{channels} needs {wanted}; write whole images, or correct the schema metadata"
            )
        if len(values):
            flat = np.frombuffer(values.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
            out[start : start + len(values)] = flat.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
        start += len(values)
    return out


def _decoded_column(
    path: Path, md5: str, column: pa.ChunkedArray, shape: tuple[int, int, int], background: str
) -> tuple[np.ndarray, list[str]]:
    """uint8 [n, c, h, w] of a column of encoded images, and notes for the reader."""
    blobs = column.to_pylist()

    def decode(row: int) -> images.Decoded:
        what = f"{path}: image in row {row}"
        decoded = images.decode(blobs[row], what, channels=shape[0], size=None, background=background)
        if decoded.pixels.shape != shape:
            found, said = (f"{s[1]}x{s[2]}" for s in (decoded.pixels.shape, shape))
            raise RejectedError(f"{what} is {found} as it is shown, the schema metadata say {said}; make them agree")
        return decoded

    ground = bytes(images.colour(background)).hex()
    pixels, kinds = images.decode_all(f"{md5}-{ground}", len(blobs), shape, decode)
    return pixels, images.notes(kinds, background)
