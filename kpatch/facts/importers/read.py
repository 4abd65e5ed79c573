"""A file of published records → facts, with everything that did not become one or stands in another's way."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kpatch.errors import BadInput
from kpatch.facts.check import Checker
from kpatch.facts.conflicts import give_ids, settle
from kpatch.facts.fact import FACT_KEYS, Fact
from kpatch.facts.importers.formats import FORMATS, Format
from kpatch.facts.importers.questions import ALT, ANSWERS
from kpatch.facts.importers.record import Record, RecordError
from kpatch.facts.load import load_facts, read_text
from kpatch.facts.problems import Kind, Problems, cut
from kpatch.facts.tables import KeyTwiceError, decode_json

_JSON, _LINES, _TABLE = (".json",), (".jsonl", ".ndjson"), (".csv",)
_YAML = (".yaml", ".yml")
_DATA_SET = Kind("data set", "docs/import.md")


@dataclass(frozen=True)
class Imported:
    """What became of the records of one file.

    `facts` have ids; `rejected` are records that break a rule, `repeats` facts that say again what an earlier one
    says: both are left out. `conflicts` are facts that contradict an earlier one, kept unless asked otherwise.
    Each is one line that names the record. `left_out` are the keys of the other records that did not go into a fact,
    with the number of records that have them.
    """

    format: str
    records: int
    facts: tuple[Fact, ...]
    rejected: tuple[str, ...]
    repeats: tuple[str, ...]
    conflicts: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def import_facts(
    path: str | Path,
    format: str | None = None,
    *,
    target: str | None = None,
    limit: int | None = None,
    drop_conflicts: bool = False,
) -> Imported:
    """Read the first `limit` records of a data set as facts.

    `format` is a name in FORMATS, found out unless given; `target` says which answer of zsRE is to be learned.
    Raises BadInput for a file or format that cannot be read and where no record is a fact.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        known = [f"{row.name}: {row.about}" for row in FORMATS.values()]
        raise BadInput(f"`format` {format!r} is not known", details=["expected one of", *known])
    if limit is not None and limit < 1:
        raise BadInput(f"`limit` {limit} takes no record", details=["expected 1 or more"])
    if path.suffix.lower() in _YAML or (path.suffix.lower() in _TABLE and is_fact_table(path, format)):
        return _facts_file(path, format, limit, drop_conflicts)
    records = read_records(path)
    if not records:
        raise BadInput("The file has no records", where=str(path))
    row = _format(path, records, format)
    if target is not None and row.name != "zsre":
        raise BadInput(f"`target` is for zsRE; {path.name} is {row.about}")
    if target not in (None, ALT, ANSWERS):
        raise BadInput(f"`target` {target!r} is not known", details=[f"expected {ALT} or {ANSWERS}"])
    if limit is not None:
        records = records[:limit]
    facts: list[Fact] = []
    rejected: list[str] = []
    left_out: Counter[str] = Counter()
    for number, record in enumerate(records, 1):
        found, wrong, unread = _convert(record, row, target or ALT, f"record {number}{_name(record)}")
        facts += found
        rejected += wrong
        left_out.update(sorted(unread))
    if not facts:
        raise BadInput(
            f"No record of {path.name} is a fact",
            where=str(path),
            details=[f"read as {row.about}", *rejected[:10]],
            hint="`format` names another data set; docs/import.md shows what each looks like",
        )
    return replace(_settled(row.name, len(records), facts, rejected, drop_conflicts), left_out=dict(left_out))


def _settled(name: str, records: int, facts: list[Fact], rejected: list[str], drop_conflicts: bool) -> Imported:
    settled = settle(facts)
    dropped = set(settled.contradicting) if drop_conflicts else set()
    kept = [fact for index, fact in enumerate(settled.facts) if index not in dropped]
    taken: set[str] = set()
    for index, fact in enumerate(kept):
        if fact.id in taken:
            kept[index] = replace(fact, id="")
        taken.add(fact.id)
    return Imported(
        name, records, tuple(give_ids(kept)), tuple(rejected), tuple(settled.repeats), tuple(settled.conflicts)
    )


def _facts_file(path: Path, format: str | None, limit: int | None, drop_conflicts: bool) -> Imported:
    if format not in (None, "facts"):
        raise BadInput(f"{path.name} is no file of {FORMATS[format].about}", details=["expected .json or .jsonl"])
    file = load_facts(path, conflicts=True)
    facts = list(file.facts[:limit])
    return _settled("facts", len(facts), facts, [], drop_conflicts)


def read_records(path: Path) -> list[Any]:
    """The records of a JSON, JSON Lines or CSV file, with scalars as text. Raises BadInput for one that has none."""
    text = read_text(path, (*_JSON, *_LINES, *_TABLE, *_YAML), _DATA_SET)
    if path.suffix.lower() in _TABLE:
        return _rows(path, text)
    before = 0  # lines above the one that is read
    try:
        if path.suffix.lower() in _LINES:
            records = []
            for before, line in enumerate(text.split("\n")):  # noqa: B007  told where a line is wrong
                if line.strip():
                    records.append(decode_json(line))
            return records
        data = decode_json(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{before + error.lineno}:{error.colno}"
        hint = "where each line is a record of its own, call the file .jsonl" if error.msg == "Extra data" else None
        raise BadInput("The file is not valid JSON", where=where, details=[error.msg], hint=hint) from error
    except RecursionError as error:
        raise BadInput("The file is nested too deeply", where=str(path)) from error
    except KeyTwiceError as error:
        where = f"{path}:{before + 1}" if path.suffix.lower() in _LINES else str(path)
        first, value = error.begins
        details = [f"{error.key!r} stands twice in the object that begins with {first!r}: {cut(str(value))}"]
        hint = "keep the pair that is meant"
        raise BadInput("An object of the file has a key twice", where=where, details=details, hint=hint) from error
    if isinstance(data, Mapping):
        data = _from_object(data, path)
    if not isinstance(data, list):
        raise BadInput("The file has no records", where=str(path), details=["expected a JSON list of objects"])
    return data


def _from_object(data: Mapping[str, Any], path: Path) -> list[Any]:
    """The records of {"data": […]}, also beside a version or so, and of {"0": {…}, "1": {…}}; else the object is one
    record by itself.

    Raises BadInput for {"train": […], "test": […]}, of which nothing says which one is meant.
    """
    values = list(data.values())
    if not any(row.fits(data) for row in FORMATS.values()):
        lists = {key: value for key, value in data.items() if isinstance(value, list) and value}
        lists = {key: value for key, value in lists.items() if all(isinstance(item, dict) for item in value)}
        if len(lists) == 1:
            return next(iter(lists.values()))
        if lists:
            raise BadInput(
                f"{path.name} holds several lists of records: {', '.join(sorted(lists))}",
                where=str(path),
                hint="write the one that is meant to a file of its own",
            )
        if len(values) == 1 and isinstance(values[0], dict) and not next(iter(data)).isdecimal():
            return _from_object(values[0], path)
    return values if values and all(key.isdecimal() for key in data) else [data]


def _rows(path: Path, text: str) -> list[Any]:
    """A table's rows as records; cells beyond the header are no part of one."""
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return [{key: cell or "" for key, cell in row.items() if key is not None} for row in reader]
    except csv.Error as error:
        raise BadInput("The file is not valid CSV", where=str(path), details=[str(error)]) from error


def is_fact_table(path: Path, format: str | None) -> bool:
    """True for a CSV file with the columns of a fact file."""
    if format is not None:
        return format == "facts"
    header = next(csv.reader(io.StringIO(read_text(path, _TABLE, _DATA_SET))), [])
    if len(header) == 1 and ";" in header[0]:  # the reader of fact tables says what is wrong with it
        return True
    return {column.strip() for column in header} <= set(FACT_KEYS)


def _format(path: Path, records: list[Any], name: str | None) -> Format:
    if name is not None:
        return FORMATS[name]
    first = next((record for record in records if isinstance(record, Mapping) and record), {})
    for row in FORMATS.values():
        if row.fits(first):
            return row
    known = [f"{row.name}: {row.about}" for row in FORMATS.values()]
    raise BadInput(
        "The records are of no form that is known",
        where=str(path),
        details=[f"the first has the keys {', '.join(map(str, first)) or 'none'}", "expected one of", *known],
        hint="name it with `format`, or write the keys 'subject', 'prompt' and 'target', as a fact file has them",
    )


def _convert(record: Any, row: Format, target: str, where: str) -> tuple[list[Fact], list[str], set[str]]:
    """The facts of one record, what is wrong with it, and the keys left out; it breaks a rule as a whole or not."""
    if not isinstance(record, Mapping):
        return [], [f"{where}: expected an object, found {type(record).__name__}"], set()
    watched = Record(record)
    try:
        drafts = row.facts(watched, target)
    except RecordError as error:
        return [], [f"{where}: {error}"], set()
    except KeyError as error:
        return [], [f"{where}: {error} is missing, which a record of the form {row.name} has"], set()
    except (AttributeError, TypeError) as error:
        return [], [f"{where}: is not of the form {row.name} ({type(error).__name__}: {error})"], set()
    problems = Problems()
    checker = Checker(problems)
    if not drafts:
        return [], [f"{where}: holds no edit"], set()
    facts = [checker.fact(draft, (), where) for draft in drafts]
    if len(problems):
        return [], [f"{where}: {'; '.join(problems.messages)}"], set()
    return [fact for fact in facts if fact is not None], [], watched.left_out()


def _name(record: Any) -> str:
    if isinstance(record, Mapping):
        for key in ("case_id", "known_id", "id"):
            if record.get(key):
                return f" ({key} {record[key]})"
    return ""
