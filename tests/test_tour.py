"""Commands in the documents run, in one folder and on embedded data, or say in a comment why they do not."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime import toy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>sh|python)\n(?P<text>.*?)^```", re.M | re.S
)
RUN = ("tour.md", "own_models.md")
"""The pages whose blocks without a reason are run."""

Command = Callable[..., toy.Done]


def blocks(page: Path) -> list[tuple[str, str, str | None]]:
    """Language, text, and why it is not run, of each block of a page."""
    return [(one["language"], one["text"], one["why"]) for one in FENCE.finditer(page.read_text("utf-8"))]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in RUN], ids=lambda page: page.name)
def test_commands_that_no_test_runs_say_why(page: Path) -> None:
    assert [text for language, text, why in blocks(page) if language == "sh" and not why] == []


def test_what_a_reason_names_is_there() -> None:
    why = " ".join(why for page in PAGES for _, _, why in blocks(page) if why)
    named = set(re.findall(r"tests/[\w/.]*\w", why))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_of_the_tour_runs(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, but for the lines that call another program."""
    monkeypatch.chdir(tmp_path)
    ran = 0
    for language, text, why in blocks(ROOT / "docs" / "tour.md"):
        if language == "python":
            exec(compile(text, "tour.md", "exec"), {})
        elif not why:
            for line in text.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line)
                assert program == "ray-dfml"
                done = command(*words)
                assert done.code == 0, f"{line}: {done.err}"
                ran += 1
    assert ran == 15
    for made in ("pool.html", "out.yaml", "runs/free/report.html", "comparison.md", "mine.onnx"):
        assert (tmp_path / made).stat().st_size > 0, made


def test_names_of_weights_are_printed() -> None:
    (line,) = [text for _, text, why in blocks(ROOT / "docs" / "own_models.md") if not why]
    program, *words = shlex.split(line.replace("\\\n", " "))
    assert program == "python"
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "head.weight" in done.stdout.split()
