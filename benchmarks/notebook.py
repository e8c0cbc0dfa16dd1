"""Runs the cells of docs/notebook.ipynb from top to bottom, and keeps what they print and draw in it.

Usage: python benchmarks/notebook.py
The cells are plain Python, without commands of IPython, so no kernel is needed. A test runs them too.
"""

import base64
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


def read() -> dict[str, Any]:
    """The notebook as it is stored."""
    return json.loads(NOTEBOOK.read_text("utf-8"))


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its code cells, which run in one namespace and in the current folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    count, cells = 0, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell = cell | {"execution_count": count, "outputs": _outputs("".join(cell["source"]), names, count)}
        cells.append(cell)
    return notebook | {"cells": cells}


def _outputs(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a cell prints and draws, in the form of a notebook. Nothing tells the folder, or what went to stderr."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, f"cell {count}", "exec"), names)
    found: list[dict[str, Any]] = []
    if text := printed.getvalue().replace(f"{Path.cwd()}{os.sep}", ""):
        found.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    for number in plt.get_fignums():
        drawn = io.BytesIO()
        plt.figure(number).savefig(drawn, format="png", dpi=80, bbox_inches="tight", metadata={"Software": None})
        png = base64.b64encode(drawn.getvalue()).decode()
        found.append({"output_type": "display_data", "data": {"image/png": png}, "metadata": {}})
    plt.close("all")
    return found


def main() -> None:
    """Run the notebook in a folder that is thrown away, and store it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        made = run(read())
    text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    temporary = NOTEBOOK.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, NOTEBOOK)


if __name__ == "__main__":
    main()
