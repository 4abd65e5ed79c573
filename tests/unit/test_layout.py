"""The rules of the layout: what may import what, how long a module may be, and who may speak of options.

Each test names every module that breaks its rule.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "kpatch"
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
LONGEST = 400

# What each part may import of kpatch, besides itself; top to bottom as in the design's layout
ALLOWED: dict[str, set[str]] = {
    "facts": set(),
    "models": {"facts"},
    "trace": {"models", "facts"},
    "stats": {"models", "facts"},
    "mend": {"models", "facts", "stats", "patch"},
    "edit": {"models", "facts", "trace", "stats", "patch", "checkpoint", "evaluate", "mend"},
    "tune": {"edit", "models", "facts", "trace", "stats", "evaluate"},
    "patch": {"facts"},
    "checkpoint": {"patch", "facts"},
    "evaluate": {"models", "facts", "patch", "checkpoint"},
    "memories": {"models", "facts", "stats", "patch", "evaluate"},
    "export": {"models", "patch", "checkpoint"},
}
EVERYWHERE = {
    "errors",
    "reporter",
    "text",
    "cache",
    "parallel",
    "distributed",
    "arguments",
    "memory",
    "outputs",
    "pictures",
    "quantized",
    "_version",
}
COMMAND_LINE = {"typer", "rich", "click"}
HEAVY = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "tokenizers"}
QUICK_TO_IMPORT = {"cli", "facts", "__main__", "__init__", *EVERYWHERE}

OPTION = re.compile(r"(?<![\w-])--[a-z]| -o ")
COMMAND = re.compile(r"`kpatch [^`]*`|^pip [^`]*")


def part(name: str) -> str:
    """The package that a module is in, or its own name at the root."""
    return name.partition("/")[0].removesuffix(".py")


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@cache
def imports(name: str, at_import: bool = False) -> frozenset[str]:
    """Dotted names that a module imports; with `at_import` only those that run when it is imported."""
    return frozenset(_imports(tree(name), at_import))


def _imports(node: ast.AST, at_import: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or "." * child.level
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif isinstance(child, ast.If) and _type_checking(child.test):
            # For the type checker alone: it counts for the order of the parts, not for what an import runs
            branches = child.orelse if at_import else [*child.body, *child.orelse]
            yield from (name for other in branches for name in _imports_of(other, at_import))
        else:
            yield from _imports(child, at_import)


def _imports_of(statement: ast.stmt, at_import: bool) -> Iterator[str]:
    yield from _imports(ast.Module([statement], []), at_import)


def _type_checking(test: ast.expr) -> bool:
    return (test.id if isinstance(test, ast.Name) else getattr(test, "attr", "")) == "TYPE_CHECKING"


def tops(name: str, at_import: bool = False) -> set[str]:
    return {imported.partition(".")[0] for imported in imports(name, at_import)}


def messages(name: str) -> Iterator[tuple[int, str]]:
    """Every text in a module but docstrings, with its line; what an f-string fills in is an ellipsis."""
    yield from _messages(tree(name))


def _messages(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.JoinedStr):
        texts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        yield node.lineno, "".join(map(str, texts))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    else:
        for child in ast.iter_child_nodes(node):
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if not docstring:
                yield from _messages(child)


def speaks_of_options(text: str) -> bool:
    """Whether a message names an option; a whole command in backticks may, and so may one argument of a program."""
    return " " in text and bool(OPTION.search(COMMAND.sub("", text)))


def test_a_module_reads_at_one_sitting() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_imports_point_downwards() -> None:
    upwards = {}
    for name in MODULES:
        if part(name) in ALLOWED:
            used = {imported.split(".")[1] for imported in imports(name) if imported.startswith("kpatch.")}
            upwards[name] = used - EVERYWHERE - ALLOWED[part(name)] - {part(name)}
    assert {name: beyond for name, beyond in upwards.items() if beyond} == {}


def test_every_package_has_its_place() -> None:
    packages = {part(name) for name in MODULES if "/" in name}
    assert packages == {*ALLOWED, "cli"}


def test_imports_are_absolute() -> None:
    assert [name for name in MODULES if any(imported.startswith(".") for imported in imports(name))] == []


def test_only_the_command_line_knows_a_terminal() -> None:
    below = [name for name in MODULES if part(name) not in {"cli", "__main__"}]
    assert [name for name in below if tops(name) & COMMAND_LINE] == []


def test_click_is_never_imported() -> None:
    assert [name for name in MODULES if "click" in tops(name)] == []


def test_transformers_stays_above() -> None:
    below = [name for name in MODULES if part(name) in {"checkpoint", "patch", "facts"}]
    assert [name for name in below if tops(name) & {"transformers", "tokenizers"}] == []


def test_nothing_heavy_is_imported_at_the_top() -> None:
    quick = [name for name in MODULES if part(name) in QUICK_TO_IMPORT]
    assert [name for name in quick if tops(name, at_import=True) & HEAVY] == []


def test_packages_are_empty_but_for_their_docstring() -> None:
    packages = [name for name in MODULES if name.endswith("/__init__.py")]
    assert [name for name in packages if not ast.get_docstring(tree(name)) or len(tree(name).body) > 1] == []


def test_below_the_command_line_nothing_speaks_of_options() -> None:
    """A message names the Python parameter in backticks; the command line shows it as its option."""
    below = [name for name in MODULES if part(name) != "cli"]
    assert [
        f"{name}:{line}: {text}" for name in below for line, text in messages(name) if speaks_of_options(text)
    ] == []


def test_what_speaks_of_options() -> None:
    assert speaks_of_options("give --layers")
    assert speaks_of_options("leave out -o then")
    assert speaks_of_options("`kpatch make` with --layers")
    assert not speaks_of_options("`kpatch make --on …`, or `layers`")
    assert not speaks_of_options("--no-deps")
    assert not speaks_of_options("well-known -- in short")
