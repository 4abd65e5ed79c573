"""The Python API: docs/python.md names every function with its real parameters, and one patch is a list of one."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import kpatch
from kpatch.patch.header import read_header
from tests.support import checkpoints, cli

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
TABLE = [line for line in PAGE.splitlines() if line.startswith("| `")]
STATED = {
    call.partition("(")[0]: call for line in TABLE for call in re.findall(r"`(\w+\(.*?\))`", line.split(" | ")[0])
}


def stated(call: str) -> list[tuple[str, Any, bool]]:
    """Parameters as the page has them: name, default as text or None, whether by keyword only."""
    source = call.replace("=…", "=...")
    function = ast.parse(f"def {source}: pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    plain = [None] * (len(arguments.args) - len(arguments.defaults)) + [*arguments.defaults]
    rows = [(a.arg, d and ast.unparse(d), False) for a, d in zip(arguments.args, plain, strict=True)]
    return rows + [
        (a.arg, d and ast.unparse(d), True) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]


def real(function: Any) -> list[tuple[str, Any, bool]]:
    rows = []
    for name, one in inspect.signature(function).parameters.items():
        default = None if one.default is one.empty else "..." if name == "report" else repr(one.default)
        rows.append((name, default, one.kind is one.KEYWORD_ONLY))
    return rows


def test_names_are_imported_when_they_are_asked_for() -> None:
    assert set(kpatch.__all__) <= set(dir(kpatch))
    heavy = "print([name for name in ('torch', 'transformers', 'typer') if name in sys.modules])"
    assert cli.python(f"import sys, kpatch; kpatch.status; {heavy}") == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kpatch.nothing  # noqa: B018


def test_the_table_has_every_function() -> None:
    assert set(STATED) == set(kpatch.__all__) - {"__version__"}


@pytest.mark.parametrize("name", sorted(set(kpatch.__all__) - {"__version__"}))
def test_the_table_has_the_real_parameters(name: str) -> None:
    assert stated(STATED[name]) == real(getattr(kpatch, name))


@pytest.mark.parametrize("form", ["text", "path", "info", "patch"])
def test_one_patch_is_a_list_of_one(form: str, tmp_path: Path) -> None:
    model = checkpoints.make_checkpoint(tmp_path / "model")
    file = tmp_path / "a.patch"
    checkpoints.make_patch(file, model)
    forms = {"text": str, "path": Path, "info": read_header, "patch": kpatch.read_patch}
    patch = forms[form](file)
    assert kpatch.stack(patch).patches[0].id == read_header(file).id
    assert [one["name"] for one in kpatch.apply(patch, model).patches] == ["a"]
    assert [one["name"] for one in kpatch.revert(model, patch).patches] == ["a"]
