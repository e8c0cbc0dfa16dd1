"""Where the learner keeps its checkpoints: whole files with names, in a folder on a disk."""

from pathlib import Path

from ray_dfml.data import weights_file


class Folder:
    """The files of one folder. A file is there whole or not at all, and after a write it has reached the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """The sorted names of the files, without temporary ones."""
        return sorted(p.name for p in self.path.iterdir() if not p.name.endswith(".tmp"))

    def read(self, name: str) -> bytes:
        """A file's content. Raises OSError."""
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Put a file there, or replace it whole. Raises OSError."""
        weights_file.write_bytes(self.path / name, data)

    def remove(self, name: str) -> None:
        """Remove a file if it is there. Raises OSError."""
        (self.path / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a stopped process left half written."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)
