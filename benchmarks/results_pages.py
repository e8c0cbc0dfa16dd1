"""The pages of results, made from their templates and the tables of numbers of the package."""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

import jinja2

from ray_dfml.reproduce import registry
from ray_dfml.reproduce.registry import Number, Step

ROOT = Path(__file__).parent.parent
TEMPLATES = Path(__file__).parent / "pages"
PAGES = {
    "README.md": "readme.md.j2",
    "docs/results.md": "results.md.j2",
    "benchmarks/at_size_2cores_202611.md": "at_size.md.j2",
}
"""Page -> its template. Of a page with MARKERS only what stands between them is made."""
MARKERS = ("<!-- results:begin -->\n", "<!-- results:end -->\n")


def rendered(page: str) -> str:
    """The text of a page. Raises jinja2.UndefinedError and UsageError for names that are not known."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.globals |= {
        "n": full,
        "v": value,
        "by": apart,
        "note": note,
        "sd": spread,
        "each": each,
        "table": table,
        "rows": rows,
    }
    text = wrapped(environment.get_template(PAGES[page]).render())
    before = (ROOT / page).read_text("utf-8")
    if MARKERS[0] not in before:
        return text
    head, _, rest = before.partition(MARKERS[0])
    return f"{head}{MARKERS[0]}\n{text}\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}"


def full(id: str, digits: int = 2, sign: bool = False) -> str:
    """A number with its interval; a difference with its sign, if wanted."""
    _, one = registry.find(id)
    return f"{one.value:{'+' if sign else ''}.{digits}f} ± {one.half:.{digits}f}"


def apart(id: str, digits: int = 2) -> str:
    """How far a difference is from nothing, with its interval."""
    _, one = registry.find(id)
    return f"{abs(one.value):.{digits}f} ± {one.half:.{digits}f}"


def value(id: str, digits: int = 2) -> str:
    """A number alone."""
    return f"{registry.find(id)[1].value:.{digits}f}"


def each(id: str, digits: int = 2) -> str:
    """The numbers of the seeds."""
    return ", ".join(f"{one:.{digits}f}" for one in registry.find(id)[1].each)


def note(id: str) -> str:
    """What is to be known about a number."""
    return str(registry.find(id)[1].note)


def spread(id: str, digits: int = 2) -> str:
    """The sample standard deviation over the seeds."""
    return f"{statistics.stdev(registry.find(id)[1].each):.{digits}f}"


def table(name: str, *columns: str, details: bool = False, only: Sequence[str] = ()) -> str:
    """The numbers of a table that stand in `columns`, row by row in order of the first; of the rows `only`, if given.

    With `details` each row also has the numbers of the seeds in the first column, and the minutes of one seed, and the
    queries if any row asked.
    """
    known = registry.tables()[name]
    shown = [one for one in known.numbers if one.row and one.column in columns and (not only or one.row in only)]
    cells = {(one.row, one.column): one for one in shown}
    asked = any(step.queries for step in known.steps.values())
    head = ["method", *(("each seed", "minutes", *(("queries",) if asked else ())) if details else ()), *columns]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in sorted((one for (_, column), one in cells.items() if column == columns[0]), key=lambda one: -one.value):
        step = known.steps[one.of.step]
        costs = [each(one.id, 1), f"{step.minutes:.1f}", *([f"{step.queries:,}"] if asked else [])]
        values = [_cell(cells.get((one.row, column))) for column in columns]
        lines.append(f"| {' | '.join([str(one.row), *(costs if details else []), *values])} |")
    return "\n".join(lines)


def _cell(one: Number | None) -> str:
    return "" if one is None else full(one.id, sign=one.unit == "points")


def rows(name: str) -> str:
    """How the rows of a table were made, as a list: method and settings, seeds, commit. What all share comes first."""
    known = registry.tables()[name]
    first = {one.row: one for one in reversed(known.numbers) if one.row}
    settings = {row: _settings(known.steps[one.of.step]) for row, one in sorted(first.items())}
    shared = [word for word in next(iter(settings.values())) if all(word in words for words in settings.values())]
    lines = [f"- all rows: {', '.join(shared)}; {known.hardware}"]
    for row, words in settings.items():
        own = ", ".join(word for word in words if word not in shared)
        seeds = ", ".join(map(str, first[row].seeds))
        lines.append(f"- `{row}`: {own}; seed{'s' * (len(first[row].seeds) > 1)} {seeds}; commit {first[row].commit}")
    return "\n".join(lines)


def _settings(step: Step) -> list[str]:
    """The method, preset, profile and settings of a command."""
    named = [f"`{step.run[1]}`"]
    for word, text in zip(step.run, step.run[1:], strict=False):
        if word in ("--preset", "--profile"):
            named.append(f"{word[2:]} `{text}`")
        elif word == "--set":
            named.append(f"`{text}`")
    return named


def wrapped(text: str) -> str:
    """Markdown whose paragraphs and lists have lines of at most 120 letters."""
    return "\n\n".join(_wrapped(block) for block in text.strip("\n").split("\n\n")) + "\n"


def _wrapped(block: str) -> str:
    if block.startswith(("|", "#", "`" * 3, "!", "<", "    ")):
        return block
    if block.startswith("- "):
        return "\n".join(_filled(f"- {item}", "  ") for item in _items(block))
    return _filled(block, "")


def _items(block: str) -> Sequence[str]:
    return f"\n{block}".split("\n- ")[1:]


def _filled(text: str, indent: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
