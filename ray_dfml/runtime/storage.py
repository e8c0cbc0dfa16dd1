"""Where the learner keeps its checkpoints: whole files by name, in a folder of a disk."""

from pathlib import Path

from ray_dfml.data import weights_file


class Folder:
    """Files of one folder. A file is there whole or not at all, and what was written has reached the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """The names of the files, sorted; temporary ones are left out."""
        return sorted(p.name for p in self.path.iterdir() if not p.name.endswith(".tmp"))

    def read(self, name: str) -> bytes:
        """A file's content. Raises OSError."""
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Put a file there, or replace it whole. Raises OSError."""
        weights_file.write_bytes(self.path / name, data)

    def remove(self, name: str) -> None:
        """Take a file away if it is there. Raises OSError."""
        (self.path / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Take away what a stopped process left half written."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)
