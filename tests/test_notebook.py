"""The notebook runs from top to bottom, and what is stored in it is what it shows."""

from pathlib import Path

import pytest

from benchmarks import notebook


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = notebook.read()
    made = notebook.run(stored)
    assert (tmp_path / "run" / "report.html").is_file()
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    kinds = [[one["output_type"] for one in cell["outputs"]] for cell in code]
    assert kinds == [["stream"], ["stream"], ["display_data"], ["stream", "display_data"]]
    of_stored = [cell["outputs"] for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [[one["output_type"] for one in outputs] for outputs in of_stored] == kinds, "run benchmarks/notebook.py"
    said = [one["text"] for cell in made["cells"] for one in cell.get("outputs", ()) if "text" in one]
    assert said[1][0].startswith("free")
    assert said[2] == [f"{said[2][0].split()[0]} of 5 right\n"]
    assert notebook.NOTEBOOK.stat().st_size < 150_000
