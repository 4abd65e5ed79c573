"""The kinds of fact files: each gives its facts as plain data and finds the place of every part again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kpatch.facts import tables, yaml_tree
from kpatch.facts.check import Checker, kind_of
from kpatch.facts.fact import FILE_KEYS, VERSION
from kpatch.facts.problems import Path, Problems, Spot, Target, bad_file


class Source:
    """One file's facts as plain data, and how to find their places again."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        self.problems = Problems()
        self.model: str | None = None

    def prepare(self, checker: Checker) -> None:
        """Check what stands outside the facts."""

    def entries(self) -> Iterator[tuple[Path, object, Spot]]:
        raise NotImplementedError

    def locate(self, targets: Sequence[Target]) -> Sequence[Spot]:
        raise NotImplementedError


class _Yaml(Source):
    def __init__(self, text: str, name: str) -> None:
        super().__init__(text, name)
        self.tree = yaml_tree.read(text, name, self.problems)

    def prepare(self, checker: Checker) -> None:
        data = self.tree.data
        if not isinstance(data, Mapping):
            found = "nothing but comments" if not data else kind_of(data)
            raise bad_file(self.name, [f"{self.name}:1:1: expected 'facts:' and a list of facts, found {found}"])
        # keys that begin with x- hold what aliases stand for, as in other YAML formats
        own = {key: value for key, value in data.items() if not key.startswith("x-")}
        checker.unknown_keys(own, FILE_KEYS, (), "a fact file")
        version = data.get("version")
        if version and version != VERSION:
            self.problems.add(("version",), f"this kpatch reads version {VERSION}, found {version!r}")
        self.model = checker.optional(data, "model", ())
        relations = data.get("relations") or {}
        if isinstance(relations, Mapping):
            for name, relation in relations.items():
                checker.relation(name, relation, ("relations", name))
        else:
            self.problems.add(("relations",), f"expected a mapping of names to wordings, found {kind_of(relations)}")
        protect = data.get("protect") or []
        if isinstance(protect, list):
            for index, entry in enumerate(protect):
                checker.protected(entry, ("protect", index))
        else:
            self.problems.add(("protect",), f"expected a list of subjects, found {kind_of(protect)}")
        if "facts" not in data:
            self.problems.add((), "'facts' is missing")
        elif data["facts"] and not isinstance(data["facts"], list):
            self.problems.add(
                ("facts",), f"expected a list of facts, found {kind_of(data['facts'])}; begin each with '- '"
            )

    def entries(self) -> Iterator[tuple[Path, object, Spot]]:
        facts = self.tree.data.get("facts") if isinstance(self.tree.data, Mapping) else None
        for index, data in enumerate(facts if isinstance(facts, list) else ()):
            path: Path = ("facts", index)
            yield path, data, self.tree.spot(Target(path))

    def locate(self, targets: Sequence[Target]) -> Sequence[Spot]:
        return yaml_tree.locate(self.text, self.name, targets)


class _Rows(Source):
    """Files without anything but facts: a path's first part is the row's number."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text, name)
        self.rows: list[tables.Row] = []

    def read(self) -> Iterator[tables.Row]:
        raise NotImplementedError

    def entries(self) -> Iterator[tuple[Path, object, Spot]]:
        self.rows = list(self.read())
        for index, row in enumerate(self.rows):
            yield (index,), row.data, row.spot


class _Lines(_Rows):
    def read(self) -> Iterator[tables.Row]:
        return tables.read_lines(self.text, self.problems)

    def locate(self, targets: Sequence[Target]) -> Sequence[Spot]:
        return [tables.locate_line(self.rows[int(path[0])], Target(path[1:], key)) for path, key in targets]


class _Table(_Rows):
    def read(self) -> Iterator[tables.Row]:
        return tables.read_table(self.text, self.problems)

    def locate(self, targets: Sequence[Target]) -> Sequence[Spot]:
        columns = tables.columns_of(self.text)
        return [tables.locate_cell(self.rows[int(path[0])], Target(path[1:]), columns) for path, _ in targets]


SOURCES: dict[str, type[Source]] = {
    ".yaml": _Yaml,
    ".yml": _Yaml,
    ".jsonl": _Lines,
    ".ndjson": _Lines,
    ".csv": _Table,
}
