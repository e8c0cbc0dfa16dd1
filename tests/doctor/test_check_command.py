"""`pool check` with its page and its list of teachers to leave out, which `train` reads."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_dfml.config import resolve
from ray_dfml.data import quarantine
from ray_dfml.data.pool import Pool
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.runtime.inputs import read_inputs
from tests.doctor.conftest import put
from tests.runtime import toy
from tests.test_report import Page

Command = Callable[..., toy.Done]


def test_findings_page_and_list(tmp_path: Path, spoiled_pool: Path, command: Command) -> None:
    page, out = tmp_path / "pool.html", tmp_path / "out.yaml"
    done = command("pool", "check", spoiled_pool, "--html", page, "--quarantine", out)
    assert done.code == 0, done.err
    assert re.match(r"cost: about .* for 11 teachers in 1 process; nobody is asked\n", done.err)
    teachers, findings = done.out.split("\n\n")
    assert [line.split()[1] for line in teachers.splitlines()] == ["ok"] * 11
    severities = [line.split()[0] for line in findings.splitlines()]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert "warning  noise: its weights look like noise" in findings
    assert set(quarantine.read(out)) == {"never", "noise", "turned", "near"}
    assert "never trained" in out.read_text()

    text = page.read_text()
    Page(text)
    assert re.search(r'class="answer noise" aria-label="Answer"><p>Of 11 teachers, all run, and 4 are suspect', text)
    assert text.count("<svg ") == text.count('<svg role="img" aria-label="') == text.count("<summary>Numbers") == 2
    assert len(page.read_bytes()) < 200_000
    cfg = resolve("free", pool=(str(spoiled_pool),), settings=[f"pool.without={out}"])
    assert set(cfg.choice.without) == {"never", "noise", "turned", "near"}, "the run folder holds the ids, not the file"
    inputs = read_inputs(cfg)
    assert [card.id for card in inputs.world.cards] == [f"good-{n}" for n in range(7)]
    assert "pool.without leaves out 4 teachers: never, noise, turned, near" in inputs.notes


def test_json_has_the_findings_of_each_teacher(spoiled_pool: Path, command: Command) -> None:
    rows = {row["id"]: row for row in json.loads(command("pool", "check", spoiled_pool, "--json").out)}
    (found,) = [one for one in rows["never"]["findings"] if one["severity"] == "warning"]
    assert (found["kind"], "never trained" in found["text"]) == ("untrained", True)


def test_what_the_names_of_a_stranger_hold_is_escaped(tmp_path: Path, glyph_teachers: list, command: Command) -> None:
    pool = Pool.create(tmp_path / "pool")
    put(pool, "a", *glyph_teachers[0], classes=("<script>alert(1)</script>", "b", "c", "<Script>alert(1)</script>"))
    assert command("pool", "check", pool.path, "--html", tmp_path / "p.html").code == 0
    text = (tmp_path / "p.html").read_text()
    assert "<script" not in text.lower()
    assert "&lt;script&gt;alert(1)" in text


def test_an_empty_pool_has_a_page_too(tmp_path: Path, command: Command) -> None:
    Pool.create(tmp_path / "pool")
    assert command("pool", "check", tmp_path / "pool", "--html", tmp_path / "p.html").code == 3
    assert "The pool holds no teacher." in (tmp_path / "p.html").read_text()


def test_teachers_are_left_out_by_their_ids(spoiled_pool: Path) -> None:
    def read(*ids: str) -> list[str]:
        inputs = read_inputs(resolve("free", pool=(str(spoiled_pool),), settings=[f"pool.without={','.join(ids)}"]))
        return [card.id for card in inputs.world.cards] + inputs.notes

    found = read("never", "nobody")
    assert "never" not in found
    assert "good-0" in found
    assert "pool.without names no usable teacher by nobody" in found
    with pytest.raises(UsageError, match=r"pool\.without: every usable teacher is left out"):
        read(*(card.id for card in Pool.open(spoiled_pool).cards))


@pytest.mark.parametrize("text", ["", "[a]", "without: 3", "without: [1]", "without: {a: [", "with: {}"])
def test_what_is_no_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "out.yaml").write_text(text)
    with pytest.raises(RejectedError, match="not a list of teachers"):
        quarantine.read(tmp_path / "out.yaml")
    with pytest.raises(UsageError, match="no such file"):
        quarantine.read(tmp_path / "none.yaml")
