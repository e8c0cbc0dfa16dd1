"""The shape of the repository: what may be where, and who may know of whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_dfml.methods import METHODS
from ray_dfml.ops import of_method
from tests.runtime import toy

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ray_dfml"
SOURCES = sorted(PACKAGE.rglob("*.py"))

ALLOWED = {
    "pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "ray_dfml", "tests", "benchmarks", "docs", "cluster",
    "tune_configs",
}  # fmt: skip
MADE = {"ray_dfml.egg-info", "build", "dist", "runs", "pools", "uv.lock"}
"""What tools and runs leave; git ignores it."""

Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_top_level() -> None:
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - ALLOWED - MADE == set()
    assert {"pyproject.toml", "README.md", "LICENSE", "ray_dfml", "tests"} <= found


def test_what_is_made_is_ignored() -> None:
    ignored = (ROOT / ".gitignore").read_text()
    assert [name for name in MADE if name not in ignored and f"*{Path(name).suffix}" not in ignored] == []


DOCUMENTS = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_documents_are_there() -> None:
    """Nothing else in `docs`: what a page says is held to the code in tests/test_readme.py."""
    assert {path.name for path in (ROOT / "docs").iterdir()} == {
        "architecture.md", "inputs.md", "methods.md", "methods_purer_bidf.md", "methods_black_box.md",
        "methods_ideal.md", "doctor.md", "services.md", "storage.md", "sweeps.md", "own_models.md",
        "training.md", "run_folder.md", "reports.md", "img", "cluster.md", "results.md", "index.md",
        "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "tour.md", "notebook.ipynb", "limits.md", "add_a_method.md",
    }  # fmt: skip


def test_pictures_are_small_and_shown() -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    for path in (ROOT / "docs" / "img").iterdir():
        assert path.stat().st_size <= 150_000, path.name
        assert f"img/{path.name})" in text, path.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_document_is_short_and_has_something_to_say(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    assert len(text) > 1000
    assert len(text.splitlines()) < 400
    assert [line for line in text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 400
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert path.stem not in ("utils", "util", "helpers", "tool", "common", "misc")


def public(node: ast.AST, where: str) -> Iterator[tuple[str, Node]]:
    """Functions and classes without an underscore in front, and those of public classes; none inside functions.

    `forward` of a torch module is what its class says.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Node) and not child.name.startswith("_") and child.name != "forward":
            yield f"{where}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{where}.{child.name}")


def test_everything_public_is_documented() -> None:
    silent = [
        name for path in SOURCES for name, node in public(ast.parse(path.read_text()), name_of(path))
        if not ast.get_docstring(node)
    ]  # fmt: skip
    assert silent == []


def test_the_accelerator_has_one_home() -> None:
    assert [name_of(path) for path in SOURCES if "cuda" in path.read_text()] == ["ray_dfml/runtime/shard.py"]


def test_nothing_is_pickled() -> None:
    """No pickle but its error, none of its kin, no torch.save; torch.load only of tensors, numpy without objects."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                found += [(name_of(path), "from pickle")] if node.module == "pickle" else []
            found += [(name_of(path), n) for n in names if n.split(".")[0] in KIN]
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                found += [(name_of(path), node.attr)] if node.attr != "UnpicklingError" else []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if call == "torch.save" or (call == "torch.load" and given.get("weights_only") != "True"):
                    found.append((name_of(path), call))
                if call in ("np.load", "np.save") and given.get("allow_pickle", "False") != "False":
                    found.append((name_of(path), call))
    assert found == []


KIN = {"cloudpickle", "dill", "joblib", "shelve", "marshal"}


def imports(path: Path) -> set[str]:
    """Top names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_ray_is_imported_in_one_file_and_its_tune_in_another() -> None:
    """After the variables that they read at import."""
    assert [name_of(path) for path in SOURCES if "ray" in imports(path)] == [
        "ray_dfml/runtime/ray_environment.py", "ray_dfml/sweeps/ray_tune.py",
    ]  # fmt: skip
    assert [name_of(path) for path in SOURCES if "pandas" in imports(path)] == []


def test_no_two_methods_have_an_op_of_one_name() -> None:
    names = [op for name, method in METHODS.items() for op in of_method(name, method)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_a_method_is_described(method: str) -> None:
    fields = METHODS[method].Config.model_fields.items()
    assert [name for name, field in fields if not field.description and name not in ("meta", "replay")] == []


def test_only_the_methods_know_their_names() -> None:
    """What is one method's is in its folder or module; what is beside them asks `METHODS`, but `quickstart` is FREE."""
    knows = (PACKAGE / "methods", PACKAGE / "cli" / "quickstart.py")
    beside = [path for path in SOURCES if not any(map(path.is_relative_to, knows))]
    names = {f'"{name}"' for name in METHODS} | {"isinstance(cfg"}
    found = [(name_of(path), name) for path in beside for name in names if name in path.read_text()]
    assert found == []


def test_imports_point_one_way() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([str(tool)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


WITHOUT_RAY = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ImportError("ray is blocked")
sys.meta_path.insert(0, Block())
import ray_dfml.core.net, ray_dfml.evaluate, ray_dfml.pipeline, ray_dfml.report, ray_dfml.runtime.local
import ray_dfml.runtime.build_pool, ray_dfml.runtime.meta_test
from ray_dfml import Learner, Pool, train
from ray_dfml.methods import METHODS
pool, data, run, *settings = sys.argv[1:]
rows = train("free", pool=pool, data=data, run_dir=run, settings=settings, backend="local")
assert [row["method"] for row in rows][-1] == "random", rows
assert Learner.load(run).way == len(Pool.open(pool).cards[0].classes)
assert "ray" not in sys.modules
from ray_dfml.cli import main
main(["train", "free", "--pool", pool, "--run-dir", run + "-2"])
"""


def test_a_run_of_one_process_needs_no_ray(tmp_path: Path, free_run: Path, toy_pool: Path, toy_data: str) -> None:
    words = [str(toy_pool), toy_data, str(tmp_path / "run"), *toy.SETTINGS["free"]]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "ray-dfml: this needs Ray: pip install 'ray[default]', or use --backend local"
    )
    assert not (tmp_path / "run-2").exists()
    toy.assert_same_run(tmp_path / "run", free_run)


BEFORE_RAY = """
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "ray":
            names = ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")
            print(*(os.environ.get(n) for n in names), len(os.environ.get("RAY_AUTH_TOKEN", "")))
            sys.exit(0)
sys.meta_path.insert(0, Watch())
for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED"):
    os.environ.pop(name, None)
os.environ.update(word.split("=") for word in sys.argv[1:])
import ray_dfml.runtime.cluster
"""


@pytest.mark.parametrize(
    ("given", "wanted"),
    [([], "token 0 64"), (["RAY_AUTH_MODE=disabled"], "disabled 0 0"), (["RAY_ADDRESS=auto"], "None 0 0")],
)
def test_ray_is_guarded_before_it_is_imported(given: list[str], wanted: str) -> None:
    """A private cluster gets a token; what the user or an existing cluster has set is left alone."""
    done = subprocess.run([sys.executable, "-c", BEFORE_RAY, *given], capture_output=True, text=True, check=False)
    assert done.stdout.split() == wanted.split(), done.stderr
