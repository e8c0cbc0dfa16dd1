"""Lists of teachers to leave out, with the evidence: what the doctor writes and `--set pool.without=FILE` reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ray_dfml import yaml_text
from ray_dfml.data import weights_file
from ray_dfml.errors import RejectedError, UsageError

FILE_BYTES = 4 << 20
"""Size of the largest list that is parsed."""
SUFFIXES = (".yaml", ".yml")
"""What the name of a list ends in."""


def text(found: Mapping[str, Sequence[str]], command: str) -> str:
    """The list as YAML: id of each teacher -> why. It is a proposal, and a reader may strike lines out."""
    maker = " ".join(command.split())
    head = (
        f"# made by: {maker}\n# Teachers that it proposes to leave out, with the evidence. Strike out those to keep,"
        " and train with\n# --set pool.without=THIS_FILE\n"
    )
    return head + yaml_text.dump({"without": {id: list(why) for id, why in found.items()}})


def read(path: Path) -> tuple[str, ...]:
    """The ids in a list. Raises UsageError if there is no such file, and RejectedError if it is not such a list."""
    if not path.is_file():
        raise UsageError(f"pool.without={path}: no such file; name ids, or a list that `pool check --quarantine` wrote")
    try:
        data = weights_file.read_bytes(path, limits=weights_file.Limits(file_bytes=FILE_BYTES))
        content = yaml_text.load(data)
        listed = content["without"]
        ids = tuple(listed or {})
    except (RejectedError, yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError):
        raise RejectedError(f"{path}: not a list of teachers; expected `without:` with ids below it") from None
    if not isinstance(listed, dict | list | None) or not all(isinstance(id, str) for id in ids):
        raise RejectedError(f"{path}: not a list of teachers; expected `without:` with ids below it")
    return ids
