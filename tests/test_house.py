"""House rules: imports point downward, files are short, and no layer above the families depends on one of them."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"qvl_kernels": ROOT / "kernels", "qvl_runtime": ROOT, "qvl_convert": ROOT / "convert"}
MAX_LINES = 400

LAYERS = (
    ("qvl_kernels",),
    ("qvl_runtime.errors", "qvl_runtime.slices", "qvl_runtime.trace"),
    ("qvl_runtime.file",),
    ("qvl_runtime.inputs", "qvl_runtime.boxes", "qvl_runtime.drawing", "qvl_runtime.saving"),
    ("qvl_runtime.engine",),
    ("qvl_runtime.families",),
    ("qvl_runtime.blob", "qvl_runtime.budget", "qvl_runtime.backends", "qvl_runtime.options", "qvl_runtime.results"),
    ("qvl_runtime.engine_client", "qvl_runtime.batching", "qvl_runtime.request_methods"),
    ("qvl_runtime.model", "qvl_runtime.loading"),
    ("qvl_runtime.benchmark", "qvl_runtime.demo"),
    ("qvl_runtime.openai",),
    ("qvl_runtime.anthropic",),
    ("qvl_runtime.batch",),
    ("qvl_runtime.server",),
    ("qvl_runtime.evaluation",),
    ("qvl_convert",),
    ("qvl_runtime.cli",),
)
"""From the bottom: a module imports from its own layer and those before it."""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in (folder / package).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str) -> set[str]:
    """Modules imported at import time: not inside functions, nor for the type checker only."""
    found: set[str] = set()
    for node in ast.parse(modules()[name].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in modules() else node.module for module in inner}
    return {module for module in found if module in modules() and module != name}


def layer(name: str) -> int | None:
    for number, prefixes in enumerate(LAYERS):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return number
    return None


def test_no_module_imports_itself_through_others():
    TopologicalSorter({name: imports(name) for name in modules()}).prepare()  # raises CycleError, which names them


def test_imports_go_down_only():
    upward = [
        f"{name} imports {other}"
        for name in modules()
        for other in imports(name)
        if layer(name) is not None and layer(other) is not None and layer(other) > layer(name)
    ]
    assert not upward


def test_every_module_has_a_layer():
    top = {"qvl_runtime", "qvl_runtime.__main__"}
    assert [name for name in modules() if layer(name) is None and name not in top] == []


def test_the_modules_that_the_type_checker_treats_otherwise_exist():
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    named = [name.removesuffix(".*") for entry in overrides for name in entry["module"]]
    assert [name for name in named if name.startswith("qvl_") and name not in modules()] == []


def test_the_version_is_stated_alike_and_is_none_that_was_released():
    """What was begun by a released version is told apart by it."""
    import qvl_runtime as qvl

    headings = re.findall("^## (.+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == qvl.__version__
    assert headings[0] == qvl.__version__ or (headings[0] == "Unreleased" and qvl.__version__ not in headings)


@pytest.mark.parametrize("above", ["qvl_runtime.engine", "qvl_runtime.inputs", "qvl_runtime.file", "qvl_convert"])
def test_only_the_registry_names_a_family(above):
    families = {name for name in modules() if name.startswith("qvl_runtime.families.qwen")}
    named = [f"{name} imports {other}" for name in modules() if name.startswith(above) for other in imports(name)]
    assert not [line for line in named if line.split()[-1] in families]


def test_the_names_of_the_package_are_those_a_type_checker_sees():
    import qvl_runtime as qvl

    tree = ast.parse(modules()["qvl_runtime"].read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in checked.body for alias in node.names}
    assert seen == qvl._HOMES and set(qvl.__all__) <= set(dir(qvl))
    for name, module in seen.items():
        assert getattr(qvl, name) is getattr(importlib.import_module(module), name)
    assert not hasattr(qvl, "nonsense")


def test_no_file_is_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values()}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES} == {}


EXAMPLES = sorted(
    name
    for name, path in modules().items()
    # those of a package's page open a file that is not here
    if ">>>" in path.read_text(encoding="utf-8") and path.name != "__init__.py"
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_mistakes_of_the_mutation_tests_can_be_made(monkeypatch):
    """The lines that `bench/mutants.txt` changes are in the source, each once."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from mutants import read_list

    listed = read_list(ROOT / "bench/mutants.txt")
    assert len(listed) > 100
    for mutant in listed:
        mutant.applied((ROOT / mutant.path).read_text(encoding="utf-8"))


def test_a_mutation_test_that_is_not_listed_is_refused(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import mutants

    for number in ("0", "999"):
        monkeypatch.setattr("sys.argv", ["mutants.py", "--only", number])
        with pytest.raises(SystemExit):
            mutants.main()
        assert f"--only {number}: the list has the mutants 1 to " in capsys.readouterr().err
