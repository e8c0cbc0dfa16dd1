"""Recognises files that are not what their names say, by their first bytes, and says what to do."""

from pathlib import Path

_HEAD = 512

_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned"),
    (b"<!doctype html", "a web page, not the file itself; download it again, signed in if that is needed"),
    (b"<html", "a web page, not the file itself; download it again, signed in if that is needed"),
    (b"<?xml", "an XML document, perhaps an error of the server; download it again"),
    (b'{"error', "an error message of a server, not the file itself; download it again"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"%pdf", "a PDF document; name the file that is meant"),
    (b"\x89hdf", "an HDF5 file; convert it with the library that made it"),
)  # fmt: skip


def what_it_is(source: Path | bytes) -> str | None:
    """What a file, or all its bytes, is instead of what its name says, such as `is a Git LFS pointer ...; run ...`.

    A file may also be one that `cannot be read ...`, or `is an empty file ...`. None if nothing is wrong or known.
    """
    try:
        head = source[:_HEAD] if isinstance(source, bytes) else _head_of(source)
    except OSError as error:
        return f"cannot be read ({error.strerror}); check its permissions"
    if not head:
        return "is an empty file; copy or download it again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((f"is {said}" for beginning, said in _BEGINNINGS if text.startswith(beginning)), None)


def _head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)
