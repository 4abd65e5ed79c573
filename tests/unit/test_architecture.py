"""docs/architecture.md is a true map: its rooms, its arrows, and every module, function and file that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.unit.test_layout import ALLOWED, EVERYWHERE, PACKAGE

ROOT = PACKAGE.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FUTURE = {"edit/alphaedit.py"}  # where things would go that are not there yet
NAMED = sorted(set(re.findall(r"`([a-z_]+/[\w/.]*[\w/])`", PAGE)) - FUTURE)


def exists(name: str) -> bool:
    """Whether a file, folder, module or module.attribute of this name is there, from the root or from the package."""
    return any(_is_path(top / name) or _is_attribute(top / name) for top in (ROOT, PACKAGE))


def _is_path(path: Path) -> bool:
    return path.exists() or path.with_suffix(".py").is_file()


def _is_attribute(path: Path) -> bool:
    module, *names = path.name.split(".")
    file = path.with_name(f"{module}.py")
    if not file.is_file():
        return False
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if name in _defines(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def test_the_page_names_enough_to_be_a_map() -> None:
    assert len(NAMED) > 40


@pytest.mark.parametrize("name", [name for name in NAMED if "NAME" not in name])
def test_what_the_map_names_is_there(name: str) -> None:
    assert exists(name), f"docs/architecture.md speaks of {name}"


def test_what_is_not_there_is_noticed() -> None:
    assert exists("edit/memit.Memit.edit")
    assert not exists("edit/memit.Memit.edits")
    assert not exists("edit/nowhere")


def test_the_rooms_are_those_of_the_package() -> None:
    rooms = re.findall(r"^  (\w+)/ ", PAGE, re.MULTILINE)
    assert sorted(rooms) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_the_files_beside_the_rooms_are_named() -> None:
    named = set(re.findall(r"`(\w+)\.py`", PAGE))
    assert EVERYWHERE - {"_version"} <= named


def test_the_arrows_are_those_that_the_layout_allows() -> None:
    arrows = {
        room.strip(): set(re.findall(r"\w+", used))
        for room, used in re.findall(r"(\w+) +→ ((?:\w+, )*\w+)(?=$|  )", PAGE, re.MULTILINE)
    }
    assert {room: arrows.get(room, set()) for room in ALLOWED} == ALLOWED
