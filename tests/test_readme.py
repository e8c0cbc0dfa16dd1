"""README and docs against the package: commands parse, tables equal the code, names and links exist. Nothing is run."""

import ast
import importlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ray_dfml import errors
from ray_dfml.cli import cli
from ray_dfml.config import BudgetConfig, pretrain_config, resolve
from ray_dfml.core.backbones import BACKBONES
from ray_dfml.data import foreign, images, listing, quarantine
from ray_dfml.data.manifest import Manifest, PoolBudget
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import MethodConfig
from ray_dfml.methods.free.config import CHARACTERS
from ray_dfml.methods.icfil import IcfilConfig
from ray_dfml.ops import OPS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = (
    "README.md", "docs/architecture.md", "docs/inputs.md", "docs/methods.md", "docs/methods_purer_bidf.md",
    "docs/methods_black_box.md",
    "docs/methods_ideal.md", "docs/services.md", "docs/storage.md", "docs/sweeps.md",
    "docs/CHANGELOG.md", "docs/own_models.md", "docs/training.md",
    "docs/run_folder.md", "docs/reports.md",
    "docs/cluster.md", "docs/results.md", "docs/SECURITY.md", "docs/CONTRIBUTING.md",
    "docs/index.md", "docs/doctor.md", "docs/tour.md", "docs/limits.md", "docs/add_a_method.md", "cluster/README.md",
)  # fmt: skip
TEXT = {page: (ROOT / page).read_text("utf-8") for page in PAGES}
METHOD_PAGES = "\n".join(TEXT[page] for page in PAGES if page.startswith("docs/methods"))
SETUP = 'pip install -e ".[dev]"'


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def shell_lines() -> list[str]:
    """Commands of the `sh` blocks of all pages, with continued lines joined."""
    text = "\n".join(block for page in TEXT.values() for block in fences(page, "sh")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def words_after_name(line: str) -> list[list[str]]:
    """Arguments of every `ray-dfml` called in a line, also behind `&&`, in `ray job submit` and with `submit.py`."""
    words = shlex.split(line, comments=True)
    name = "--" if "cluster/submit.py" in words else "ray-dfml"
    starts = [i for i, word in enumerate(words) if word == name]
    found = []
    for i in starts:
        rest = words[i + 1 :]
        found.append(rest[: rest.index("&&")] if "&&" in rest else rest)
    return found


COMMANDS = [words for line in shell_lines() for words in words_after_name(line)]
PROSE = "\n".join(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S) for text in TEXT.values())
INLINE = [shlex.split(span)[1:] for span in dict.fromkeys(re.findall(r"`(ray-dfml [^`]*)`", PROSE))]


PROGRAMS = ("ray ", "kubectl ")
"""Programs of others, with options of their own."""


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words name, and its arguments."""
    command: click.Command = cli
    rest = list(words)
    while isinstance(command, click.Group):
        assert rest, f"{words}: a command is missing"
        name = rest.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"no command {name!r}"
        command = found
    return command, rest


def test_readme_has_the_lines_that_others_rely_on():
    assert "pip install . && ray-dfml quickstart" in README
    assert f"{SETUP} && pytest" in README
    for marker in ("<!-- results:begin -->", "<!-- results:end -->"):
        assert README.count(marker) == 1
    assert README.index("results:begin") < README.index("results:end")


def test_commands_are_found_at_all():
    names = {find(words)[0].name for words in COMMANDS}
    assert {"quickstart", "train", "evaluate", "adapt", "build", "add", "check"} <= names


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_readme_parses(words):
    command, rest = find(words)
    command.make_context(command.name, rest)  # options, values and required arguments; the command is not invoked


@pytest.mark.parametrize("words", INLINE, ids=" ".join)
def test_a_command_named_in_passing_exists(words):
    command, rest = find(words)
    known = {flag for param in command.params for flag in param.opts}
    assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known


def test_options_named_in_passing_exist():
    known = {"--json", "--debug"} | set(re.findall(r'"(--[a-z-]+)"', (ROOT / "cluster" / "submit.py").read_text()))
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        members = command.commands.values() if isinstance(command, click.Group) else [command]
        known |= {flag for member in members for param in member.params for flag in param.opts}
    spans = [span for span in re.findall(r"`([^`\n]*)`", PROSE) if not span.startswith(PROGRAMS)]
    named = {word for span in spans for word in re.findall(r"--[a-z][a-z-]*", span)}
    assert named
    assert named <= known


def test_settings_of_readme_are_settings(tmp_path, monkeypatch):
    """Also where a setting names the list of teachers that `pool check --quarantine` wrote."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.yaml").write_text(quarantine.text({"t-1": ["a reason"]}, "pool check"))
    given = [(words[0], words[i + 1]) for words in COMMANDS for i, word in enumerate(words) if word == "--set"]
    settings = [text for name, text in given if name != "pool"]
    assert settings
    pretrain_config([text for name, text in given if name == "pool"])
    named = re.findall(r"`--set (\w+\.[^`=]+=[^`]+)`", TEXT["README.md"] + TEXT["docs/training.md"])
    assert named
    resolve("free", settings=[*settings, *named])


def test_exit_codes_are_those_of_the_errors():
    def below(cls: type[errors.DfmlError]) -> set[int]:
        return {cls.exit_code}.union(*(below(sub) for sub in cls.__subclasses__()))

    section = TEXT["docs/run_folder.md"].split("## Exit codes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", section, flags=re.M)
    assert len(rows) == len({code for code, _ in rows})
    used = {int(code) for code, meaning in rows if "not used" not in meaning}
    assert used == {0} | below(errors.DfmlError)


def test_python_of_readme_imports_what_exists():
    (block,) = fences(README, "python")
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_continuous_integration_uses_the_set_up_of_readme():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("no .ci/run in this copy")
    assert SETUP in script.read_text("utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]) if not re.match(r"[a-z]+:", link)]
    for link in links:
        assert ((ROOT / page).parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_functions_that_a_page_names_exist(page):
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT[page]):
        assert (ROOT / "ray_dfml" / file).is_file(), file
        parts = [part for part in file.removesuffix(".py").split("/") if part != "__init__"]
        if file in ("runtime/cluster.py", "runtime/dispatch.py"):  # not imported here: it would load Ray
            assert f"class {name}" in (ROOT / "ray_dfml" / file).read_text("utf-8")
            continue
        found: object = importlib.import_module(".".join(["ray_dfml", *parts]))
        for attribute in name.split("."):
            found = getattr(found, attribute)


def rows_of(section: str, text: str = METHOD_PAGES) -> list[list[str]]:
    """Cells of the table rows of a section, by default of the pages on methods, that begin with a name in backticks."""
    part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:3] == "| `"]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings as the tables show them: nested ones dotted, lists with commas."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = ", ".join(map(shown, value)) or "none" if isinstance(value, tuple) else shown(value)
    return found


def shown(value: object) -> str:
    """A number without zeros that say nothing, or a word."""
    return f"{value:g}" if isinstance(value, float) else str(value)


OF_THE_TEST = ("steps", "lrs")
"""Settings of `eval` that profiles change: rows of the table of every method with profiles."""


def settings_of(method: str, profile: str) -> dict[str, str]:
    """What the table of a method must say of a profile."""
    config = resolve(method, profile=profile)
    found = flat(config.method.model_dump())
    if METHODS[method].profiles:
        found |= flat({name: getattr(config.eval, name) for name in OF_THE_TEST}, "eval.")
    return found


def test_every_method_with_settings_has_a_table() -> None:
    own = {
        name for name, method in METHODS.items() if set(method.Config.model_fields) != set(MethodConfig.model_fields)
    }
    assert {name for name, method in METHODS.items() if method.profiles} <= own
    assert sorted(re.findall(r"^## Settings: `(.*)`$", METHOD_PAGES, flags=re.M)) == sorted({*own, "eval.icfil"})


@pytest.mark.parametrize("method", re.findall(r"^## Settings: `([a-z-]*)`$", METHOD_PAGES, flags=re.M))
def test_the_table_of_settings_equals_the_profiles(method: str) -> None:
    header, *rows = rows_of(f"Settings: `{method}`")
    profiles = {name.strip("`"): i for i, name in enumerate(header) if name.strip("`") in ("paper", "code", "fixed")}
    assert list(profiles) == (["paper", "code", "fixed"] if METHODS[method].profiles else ["fixed"])
    for profile, i in profiles.items():
        assert {row[0].strip("`"): row[i] for row in rows} == settings_of(method, profile)
    assert len({row[0] for row in rows}) == len(rows)


def test_profiles_change_of_the_test_only_what_the_tables_show() -> None:
    for method in METHODS:
        plain = resolve(method).eval.model_dump()
        for profile in ("paper", "code"):
            other = resolve(method, profile=profile).eval.model_dump()
            assert {name for name in plain if plain[name] != other[name]} <= set(OF_THE_TEST)


def test_the_table_of_the_calibration_equals_its_defaults() -> None:
    _, *rows = rows_of("Settings: `eval.icfil`")
    assert {row[0].strip("`"): row[1] for row in rows} == flat(IcfilConfig().model_dump())


def test_the_table_of_the_characters_preset_equals_it() -> None:
    said = {row[0].strip("`"): row[1] for row in rows_of("The preset `characters`")}
    assert said == flat(CHARACTERS)


def test_the_table_of_ops_names_all_that_are_sent() -> None:
    text = TEXT["docs/architecture.md"].split("\n| op | shared values")[0]
    named = [row[0].strip("`") for row in rows_of("Ops", text)]
    assert sorted(named) == sorted(OPS)


def test_the_table_of_methods_names_them_all() -> None:
    named = [row[0].strip("`") for row in rows_of("Methods", README)]
    assert named == list(METHODS)


def test_readme_names_every_architecture() -> None:
    section = README.split("## What this is not")[1].split("\n## ")[0]
    sentence = section.split("architectures")[1].split(".\n")[0]
    assert re.findall(r"`([\w-]+)`", sentence) == list(BACKBONES)


def test_the_page_of_services_names_every_budget() -> None:
    section = TEXT["docs/services.md"].split("\n## Budgets\n")[1].split("\n## ")[0]
    assert {f"budget.{name}" for name in BudgetConfig.model_fields} == set(re.findall(r"budget\.\w+", section))
    (block,) = fences(section, "yaml")
    assert Manifest.model_validate(yaml.safe_load(block)).budget == PoolBudget(queries=50000, money=20.0)
    assert f"budget: {{{', '.join(PoolBudget.model_fields)}}}" in section


def test_the_page_of_inputs_names_the_suffixes_and_splits_of_the_code():
    page = " ".join(TEXT["docs/inputs.md"].split())
    assert f"`{' '.join(images.SUFFIXES)}`" in page
    assert f"`{' '.join(foreign.SUFFIXES)}`" in page
    words = re.findall(r"`([a-z]+)`", page.partition("Their names may be in any case;")[2].partition("accepted")[0])
    assert {listing.split_of(word.title()) for word in ("train", "val", "test", *words)} == {"train", "val", "test"}
