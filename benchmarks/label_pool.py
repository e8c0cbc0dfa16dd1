"""Makes a pool of services that name a class: the first COUNT teachers of POOL, a pool folder that gives weights.

Usage: python benchmarks/label_pool.py POOL OUT COUNT
"""

import shutil
import sys
from pathlib import Path

import yaml


def main(pool: Path, out: Path, count: int) -> None:
    """Copy the pool, change its manifest, and move it to its place when it is whole."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(pool, part)
    content = yaml.safe_load((part / "pool.yaml").read_text())
    content["teachers"] = [entry | {"access": "label"} for entry in content["teachers"][:count]]
    (part / "pool.yaml").write_text(yaml.safe_dump(content))
    part.rename(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
