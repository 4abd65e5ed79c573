"""Fact files from disk: YAML, JSON Lines or CSV, every error at once and with its place."""

from __future__ import annotations

import gc
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from kpatch.errors import BadInput
from kpatch.facts.check import Checker
from kpatch.facts.conflicts import give_ids, moved, normal, refuse, repeated_ids, settle
from kpatch.facts.fact import FactFile
from kpatch.facts.problems import FACT_FILE, SHOWN, Kind, Target, at, bad_file, cut, limited, nearest
from kpatch.facts.readers import SOURCES, Source

LARGEST = 256 * 2**20
_MARK = "\ufeff"
# By its mark, or by two ASCII characters with a zero byte each, or with three
_UTF_32 = re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff|(?:[^\0]\0{3}){2}|(?:\0{3}[^\0]){2}")
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|(?:[^\0]\0){2}|(?:\0[^\0]){2}")
_HINT = "docs/facts.md describes the format"


def load_facts(path: str | Path, *, conflicts: bool = False) -> FactFile:
    """Read, check and number the facts of one file.

    Raises BadInput whose details are all errors as "file:line:column: message", and Refused for facts that
    contradict each other, with both places. With `conflicts` these are kept, with a warning: they can be asked
    about, though not be edited together.
    """
    if not isinstance(path, str | PathLike):
        raise BadInput(f"`path` is a {type(path).__name__}, not the path of a fact file")
    with _no_collection():
        return _load(Path(path), conflicts)


def _load(path: Path, conflicts: bool) -> FactFile:
    name = str(path)
    text = read_text(path)
    if not text.strip():
        raise BadInput("The fact file is empty", where=name, hint=_HINT)
    source = SOURCES[path.suffix.lower()](text, name)
    checker = Checker(source.problems)
    source.prepare(checker)
    found = []
    for inside, data, spot in source.entries():
        fact = checker.fact(data, inside, at(name, spot))
        if fact is not None:
            found.append((inside, fact))
    for inside, message in repeated_ids(found):
        source.problems.add((*inside, "id"), message)
    edited = {normal(fact.subject) for _, fact in found}
    for index, one in enumerate(checker.protect):
        if normal(one.subject) in edited:
            source.problems.add(("protect", index), f"{cut(one.subject)!r} is edited by a fact, so it cannot be held")
    source.problems.raise_any(name, source.locate)
    if not found:
        raise BadInput("The fact file has no facts", where=name, hint=_HINT)
    settled = settle(fact for _, fact in found)
    if not conflicts:
        refuse(settled.conflicts, name)
    odd = (*limited(settled.conflicts), *limited(settled.repeats), *limited(moved(settled.facts)))
    warnings = (*_warnings(name, checker, source), *odd)
    return FactFile(tuple(give_ids(settled.facts)), source.model, warnings, tuple(checker.protect))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of objects without a cycle are made here; searching them for cycles again and again takes a third."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_text(path: Path, suffixes: Collection[str] = SOURCES, kind: Kind = FACT_FILE) -> str:
    """A file's text with line ends of one kind and without a byte order mark.

    Raises BadInput for a file that is missing, too large, not UTF-8 or not named as one of `suffixes`.
    """
    name = str(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise BadInput(f"This is a folder, not a {kind.name}", where=name)
        if path.suffix.lower() not in suffixes:
            raise BadInput(
                "This is no kind of fact file" if suffixes is SOURCES else "This is no kind of file that is read here",
                where=name,
                details=[f"expected a name in {', '.join(suffixes)}; found {path.suffix or 'none of them'}"],
            )
        if size > LARGEST:
            raise BadInput(
                f"The {kind.name} is too large",
                where=name,
                details=[f"expected at most {LARGEST // 2**20} MB, found {size / 2**20:,.0f} MB"],
                hint="split it, and stack the patches",
            )
        data = path.read_bytes()
    except FileNotFoundError:
        folder = path.parent
        near = nearest(path.name, (entry.name for entry in folder.iterdir())) if folder.is_dir() else None
        hint = f"did you mean {folder / near}?" if near else None
        raise BadInput("There is no such file", where=name, hint=hint) from None
    except OSError as error:
        raise BadInput("The file cannot be read", where=name, details=[error.strerror or str(error)]) from error
    if (wide := _UTF_32.match(data)) or _UTF_16.match(data):
        kind_of = "UTF-32" if wide else "UTF-16"
        raise BadInput(f"The file is {kind_of} text", where=name, hint="save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8-sig", "replace")) + 1
        message = f"{name}:{line}:{column}: the byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise bad_file(name, [message], kind=kind) from error
    text = text.lstrip(_MARK).replace("\r\n", "\n").replace("\r", "\n")
    joined = text.find(f"\n{_MARK}")
    if joined >= 0:
        line = text.count("\n", 0, joined) + 2
        message = f"{name}:{line}:1: a byte order mark inside the file; two files were joined here, take it out"
        raise bad_file(name, [message], kind=kind)
    return text


def _warnings(name: str, checker: Checker, source: Source) -> tuple[str, ...]:
    spaced_at = [Target(path) for path in checker.spaced[:SHOWN]]
    spots = source.locate(spaced_at) if spaced_at else []  # a second look at the file
    spaced = [f"{at(name, spot)}: the prompt ends in a space, which is left out" for spot in spots]
    unused = [
        f"{name}: no fact uses the relation {relation!r}"
        for relation in checker.relations
        if relation not in checker.used
    ]
    return (*limited(spaced, len(checker.spaced)), *limited(unused))
