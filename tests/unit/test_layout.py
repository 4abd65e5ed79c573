"""The rules of the layout: what may import what, and how long a module may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "kpatch"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400

# What each part may import of kpatch, besides itself; top to bottom as in the design's layout
ALLOWED = {
    "facts": set(),
    "models": {"facts"},
    "trace": {"models", "facts"},
    "stats": {"models", "facts"},
    "edit": {"models", "facts", "stats", "patch", "checkpoint", "evaluate"},
    "patch": {"facts"},
    "checkpoint": {"patch", "facts"},
    "evaluate": {"models", "facts", "patch", "checkpoint"},
    "export": {"models", "patch", "checkpoint"},
}
EVERYWHERE = {"errors", "reporter", "cache", "distributed", "outputs", "text", "_version"}
COMMAND_LINE = {"typer", "rich", "click"}
HEAVY = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "tokenizers"}


def part(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path: Path, *, at_import: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; with `at_import` only those that run when it is imported."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")), at_import)


def _imports(node: ast.AST, at_import: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield child.module or ""
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif isinstance(child, ast.If) and _type_checking(child.test):
            yield from (name for other in child.orelse for name in _imports(other, at_import))
        else:
            yield from _imports(child, at_import)


def _type_checking(test: ast.expr) -> bool:
    return (test.id if isinstance(test, ast.Name) else getattr(test, "attr", "")) == "TYPE_CHECKING"


def tops(path: Path, *, at_import: bool = False) -> set[str]:
    return {name.partition(".")[0] for name in imports(path, at_import=at_import)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_reads_at_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize(
    "path", [path for path in MODULES if part(path) in ALLOWED], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_point_downwards(path: Path) -> None:
    used = {name.split(".")[1] for name in imports(path) if name.startswith("kpatch.")}
    own = part(path)
    beyond = used - EVERYWHERE - ALLOWED[own] - {own}
    assert not beyond, f"{path.relative_to(PACKAGE)} imports kpatch.{', kpatch.'.join(sorted(beyond))}"


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if part(path) not in {"cli", "__main__"}],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_only_the_command_line_knows_a_terminal(path: Path) -> None:
    assert not tops(path) & COMMAND_LINE


def test_click_is_never_imported() -> None:
    assert not [path for path in MODULES if "click" in tops(path)]


@pytest.mark.parametrize("name", ["checkpoint", "patch", "facts"])
def test_transformers_stays_above(name: str) -> None:
    assert not [path for path in MODULES if part(path) == name and tops(path) & {"transformers", "tokenizers"}]


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in MODULES
        if part(path)
        in {
            "cli",
            "facts",
            "__main__",
            "__init__",
            "cache",
            "errors",
            "reporter",
            "distributed",
            "outputs",
            "_version",
        }
    ],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_nothing_heavy_is_imported_at_the_top(path: Path) -> None:
    assert not tops(path, at_import=True) & HEAVY


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py" and path.parent != PACKAGE])
def test_packages_are_empty_but_for_their_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1
