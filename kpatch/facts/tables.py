"""JSON Lines and CSV: one fact per line or row, with the same keys as in YAML."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from yaml import YAMLError

from kpatch.errors import BadInput
from kpatch.facts import yaml_tree
from kpatch.facts.fact import FACT_KEYS, SIDES, TEXT_LISTS
from kpatch.facts.problems import Problems, Spot, Target, did_you_mean

_LIST_KEYS = frozenset((*SIDES, *TEXT_LISTS))
_BETWEEN = " | "
_NEEDED = ("subject", "prompt", "target")
_OTHER_SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}


class Row(NamedTuple):
    """One fact's data, the line it starts in and its text there."""

    data: object
    spot: Spot
    source: str


def read_lines(text: str, problems: Problems) -> Iterator[Row]:
    """Facts of a JSON Lines file; empty lines are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        start = len(line) - len(line.lstrip()) + 1
        try:
            data = decode_json(line)
        except json.JSONDecodeError as error:
            problems.add_at(Spot(number, error.pos + 1), f"this is not valid JSON ({error.msg}); one object a line")
        except KeyTwiceError as error:
            column = _second_key(line, error.key) or start
            problems.add_at(Spot(number, column), f"the key {error.key!r} stands here a second time")
        except RecursionError:
            problems.add_at(Spot(number, start), "nested too deeply for a fact")
        else:
            yield Row(data, Spot(number, start), line)


def locate_line(row: Row, target: Target) -> Spot:
    """Where in its line `target` stands, whose path starts at the fact. JSON is YAML: that parser knows the places."""
    try:
        spot = yaml_tree.locate(row.source, "", [target])[0]
    except (BadInput, YAMLError):  # escapes that only JSON has; the line is named all the same
        return row.spot
    return Spot(row.spot.line, spot.column)


class KeyTwiceError(ValueError):
    """An object of a JSON text has `key` twice; `begins` is that object's first pair, to find it by."""

    def __init__(self, key: str, begins: tuple[str, Any]) -> None:
        super().__init__(key)
        self.key, self.begins = key, begins


def decode_json(text: str) -> Any:
    """What a JSON text says, with scalars as text. Raises JSONDecodeError, RecursionError and KeyTwiceError."""
    return as_written(_DECODER.decode(text))


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise KeyTwiceError(key, pairs[0])
            seen.add(key)
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=str, parse_float=str, parse_constant=str)


def _second_key(line: str, key: str) -> int | None:
    word = json.dumps(key, ensure_ascii=False)
    second = line.find(word, line.find(word) + 1)
    return second + 1 if second > 0 else None


def as_written(value: Any) -> Any:
    """Scalars as text, as in YAML; null is nothing."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {key: item if type(item) is str else as_written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [item if type(item) is str else as_written(item) for item in value]
    return "" if value is None else str(value).lower()


def read_table(text: str, problems: Problems) -> Iterator[Row]:
    """Facts of a CSV file with a header row; lists are separated by " | "; empty cells and rows are passed over."""
    lines = [f"{line}\n" for line in text.split("\n")]
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    start = 0
    try:
        header = next((row for row in reader if any(cell.strip() for cell in row)), [])
        columns = _without_empty_end(header)
        if not _header_is_good(columns, reader.line_num, problems):
            return
        start = reader.line_num
        for cells in reader:
            first, start = start + 1, reader.line_num
            if not any(cells) or not any(cell.strip() for cell in cells):
                continue
            source = "".join(lines[first - 1 : start])
            if len(cells) > len(columns) and any(cell.strip() for cell in cells[len(columns) :]):
                spot = _shift(first, _cells(source)[len(columns)])
                message = (
                    f"the row has {len(cells)} cells, the header {len(columns)}; a cell with a comma needs quotes"
                )
                problems.add_at(spot, message)
                continue
            yield Row(_row_data(columns, cells), Spot(first, 1), source)
    except csv.Error as error:
        why = "quotes are closed, and those inside a quoted cell doubled"
        if "field larger" in str(error):
            why = f"a cell has at most {csv.field_size_limit():,} characters; a quote may be left open"
        message = f"this row is not valid CSV ({error}); {why}"
        problems.add_at(Spot(start + 1, 1), message)


def locate_cell(row: Row, target: Target, columns: Sequence[str]) -> Spot:
    """Where the cell of `target` starts, whose path starts at the fact."""
    if not target.path or target.path[0] not in columns:
        return row.spot
    cells = _cells(row.source)
    index = columns.index(str(target.path[0]))
    return _shift(row.spot.line, cells[index]) if index < len(cells) else row.spot


def columns_of(text: str) -> list[str]:
    """The names in a CSV file's header."""
    reader = csv.reader(f"{line}\n" for line in text.split("\n"))
    return _without_empty_end(next((row for row in reader if any(cell.strip() for cell in row)), []))


def _without_empty_end(header: Sequence[str]) -> list[str]:
    """The header's names; spreadsheets end every line in commas where a column was once used and emptied."""
    columns = [cell.strip() for cell in header]
    while columns and not columns[-1]:
        del columns[-1]
    return columns


def _row_data(columns: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, cell in zip(columns, cells, strict=False):
        if name not in _LIST_KEYS:
            data[name] = cell
        elif cell.strip():
            data[name] = [part.strip() for part in f" {cell} ".split(_BETWEEN)]
    return data


def _header_is_good(columns: Sequence[str], line: int, problems: Problems) -> bool:
    before = len(problems)
    other = _no_header(columns)
    if other is not None:
        problems.add_at(Spot(line, 1), other)
        return False
    for index, name in enumerate(columns):
        if not name:
            problems.add_at(Spot(line, 1), f"column {index + 1} has no name; leave it out, or call it one of the keys")
        elif name not in FACT_KEYS:
            known = f"; the columns are {', '.join(FACT_KEYS)}"
            problems.add_at(Spot(line, 1), f"unknown column {name!r}{did_you_mean(name, FACT_KEYS, known)}")
        elif name in columns[:index]:
            problems.add_at(Spot(line, 1), f"the column {name!r} stands here twice")
    if len(problems) == before:
        for name in _NEEDED:
            if name not in columns:
                problems.add_at(Spot(line, 1), f"the column {name!r} is missing")
    return len(problems) == before


def _no_header(columns: Sequence[str]) -> str | None:
    """What the first row is instead of a header, in words for a message; None where it may be one."""
    if not columns:
        return None
    found = next((name for sign, name in _OTHER_SEPARATORS.items() if sign in columns[0]), None)
    if len(columns) == 1 and found is not None:
        return f"the columns are separated by {found}; a fact file's are by ','"
    if columns[0].lower().startswith("sep="):
        return "this line is a note for a spreadsheet; the header with the names of the columns comes first"
    if any("{}" in name for name in columns):
        return "this row is a fact; the header with the names of the columns comes first: subject,prompt,target"
    return None


def _cells(source: str) -> list[Spot]:
    """Where each cell of one record starts, lines counted from the record's first."""
    spots = [Spot(0, 1)]
    line, column, quoted = 0, 0, False
    for sign in source:
        column += 1
        if sign == '"':
            quoted = not quoted
        elif sign == "\n":
            line, column = line + 1, 0
        elif sign == "," and not quoted:
            spots.append(Spot(line, column + 1))
    return spots


def _shift(first: int, spot: Spot) -> Spot:
    return Spot(first + spot.line, spot.column)
