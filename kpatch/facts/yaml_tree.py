"""YAML as plain text, lists and mappings with their places: no types, no tags, no surprises.

Built from the parser's events, not from a tree of nodes: less memory, and libyaml reads 100,000 facts in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import yaml

from kpatch.facts.problems import Kind, Path, Problems, Spot, Target, bad_file

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DEEPEST = 8  # a fact file needs 5
# What aliases may stand for, written out, in characters: so much, and a few times the file's own size
_WRITTEN_OUT, _TIMES = 64 * 2**20, 4
_NODE = 16  # a node's weight besides its characters
_MERGE = "<<"
_TEXT_TAGS = (None, "!", "tag:yaml.org,2002:str")
_UNREADABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_IN_COMMENT = re.compile(r"(?:^|\s)#")
_BARE_SLOT = re.compile(r"(?:^|[\s{,\[])(?:prompt|-)\s*:?\s*\{\}\s*[^\s,}\]]")
_BARE_SHORT = re.compile(r"^\s*-\s*\[.*->")


# What JSON writes for a character beyond U+FFFF: "\\ud83d\\ude00"
_SURROGATES = re.compile(r"(?<!\\)((?:\\\\)*)\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)


def _one_escape(found: re.Match[str]) -> str:
    code = 0x10000 + ((int(found[2], 16) - 0xD800) << 10) + int(found[3], 16) - 0xDC00
    return f"{found[1]}\\U{code:08x}"


class Tree(NamedTuple):
    """`data` is str, list or dict; `spots` holds the places of the outer two levels and of all that was wanted.

    What an alias stands for has the alias's place.
    """

    data: object
    spots: dict[Target, Spot]

    def spot(self, target: Target) -> Spot:
        """The place of `target`; where it has none (a missing key), that of what should have held it."""
        if target in self.spots:
            return self.spots[target]
        held = (Target(target.path[:end]) for end in range(len(target.path), -1, -1))
        return next((self.spots[place] for place in held if place in self.spots), Spot(1, 1))


class _LimitError(yaml.MarkedYAMLError):
    """YAML that is valid and more than a file may be; `problem` is the whole message."""


class _Anchor(NamedTuple):
    """What an alias stands for, with its weight and its depth; None while it is not read to its end."""

    value: object = None
    weight: int = 0
    height: int = -1


def read(text: str, name: str, problems: Problems, wanted: Collection[Target] = ()) -> Tree:
    """Parse `text` with line ends of one kind.

    Anchors, aliases and merge keys (<<) are followed. Duplicate keys, tags and aliases that name nothing go to
    `problems`; raises BadInput for what is not YAML at all, or too large once its aliases are written out.
    """
    _refuse_characters(text, name, problems.kind)
    try:
        try:
            return _Builder(text, problems, frozenset(wanted)).document()
        except yaml.MarkedYAMLError as error:  # JSON is YAML but for this
            if "character escape code" not in str(error.problem) or not _SURROGATES.search(text):
                raise
        return _Builder(text, problems, frozenset(wanted), escapes=True).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        spot = Spot(mark.line + 1, mark.column + 1) if mark else Spot(1, 1)
        message = error.problem if isinstance(error, _LimitError) else _explain(error, text.split("\n"))
        raise bad_file(name, [f"{name}:{spot.line}:{spot.column}: {message}"], kind=problems.kind) from error


def locate(text: str, name: str, wanted: Sequence[Target]) -> list[Spot]:
    """The places of `wanted`; where one does not exist (a missing key), the place of what should have held it."""
    parents = {Target(target.path[:end]) for target in wanted for end in range(len(target.path) + 1)}
    tree = read(text, name, Problems(), parents.union(wanted))
    return [tree.spot(target) for target in wanted]


class _Builder:
    def __init__(self, text: str, problems: Problems, wanted: frozenset[Target], escapes: bool = False) -> None:
        self.shortened: dict[int, list[int]] = {}  # columns behind JSON's escapes, by line: they lost two characters
        if escapes:
            for number, line in enumerate(text.split("\n")):
                ends = [found.end() - 2 * count for count, found in enumerate(_SURROGATES.finditer(line), 1)]
                if ends:
                    self.shortened[number] = ends
            text = _SURROGATES.sub(_one_escape, text)
        self.next_event = _LOADER(text).get_event
        self.problems = problems
        self.wanted = wanted
        self.spots: dict[Target, Spot] = {}
        self.anchors: dict[str, _Anchor] = {}
        self.anchored: dict[int, _Anchor] = {}  # by the identity of their values, which `anchors` may have let go
        self.room = _WRITTEN_OUT + _TIMES * len(text)

    def spot(self, event: Any) -> Spot:
        """Where an event starts in the text as it was given."""
        line, column = event.start_mark.line, event.start_mark.column
        return Spot(line + 1, column + 1 + 2 * sum(end <= column for end in self.shortened.get(line, ())))

    def document(self) -> Tree:
        self.next_event()  # the stream's start
        if isinstance(self.next_event(), yaml.StreamEndEvent):
            return Tree("", self.spots)
        data = self.node(self.next_event(), ())
        self.next_event()  # the document's end
        event = self.next_event()
        if not isinstance(event, yaml.StreamEndEvent):
            self.problems.add_at(
                self.spot(event), f"a second document starts here; a {self.problems.kind.name} is one document"
            )
        return Tree(data, self.spots)

    def node(self, event: Any, path: Path) -> object:
        kind = type(event)
        if len(path) <= 2 or self.wanted:
            target = Target(path)
            if len(path) <= 2 or target in self.wanted:
                self.spots.setdefault(target, self.spot(event))
        if kind is yaml.AliasEvent:
            return self.alias(event, path)
        if event.anchor is None:
            return self.plain_node(event, path)
        self.anchors[event.anchor] = _Anchor()
        value = self.plain_node(event, path)
        anchor = _Anchor(value, *self.measure(value))
        self.anchors[event.anchor] = anchor
        if not isinstance(value, str):
            self.anchored[id(value)] = anchor
        return value

    def plain_node(self, event: Any, path: Path) -> object:
        """A node that is written out."""
        kind = type(event)
        if kind is yaml.ScalarEvent:
            if event.tag not in _TEXT_TAGS:
                self.problems.add_at(
                    self.spot(event), f"tags such as {event.tag!r} have no meaning in a {self.problems.kind.name}"
                )
            return _value(event)
        if event.tag is not None:
            self.problems.add_at(
                self.spot(event), f"tags such as {event.tag!r} have no meaning in a {self.problems.kind.name}"
            )
        if len(path) >= _DEEPEST:
            raise _LimitError(
                problem=f"nested too deeply for a {self.problems.kind.name}", problem_mark=event.start_mark
            )
        return self.mapping(path) if kind is yaml.MappingStartEvent else list(self.items(path))

    def alias(self, event: Any, path: Path) -> object:
        """What an alias stands for: the same object, so that a million of them take no more memory than one.

        Raises _LimitError where they would be too much once written out, as all of them are when they are checked.
        """
        anchor = self.anchors.get(event.anchor)
        if anchor is None or anchor.height < 0:
            why = "names nothing above it" if anchor is None else "stands inside what it names"
            self.problems.add_at(
                self.spot(event), f"the alias '*{event.anchor}' {why}; put the text in quotes if it is one"
            )
            return f"*{event.anchor}"
        self.room -= anchor.weight
        if self.room < 0:
            problem = f"with its aliases written out, the file is larger than {_WRITTEN_OUT // 2**20} MB"
            raise _LimitError(problem=problem, problem_mark=event.start_mark)
        if len(path) + anchor.height > _DEEPEST:
            raise _LimitError(
                problem=f"nested too deeply for a {self.problems.kind.name}", problem_mark=event.start_mark
            )
        return anchor.value

    def measure(self, value: object) -> tuple[int, int]:
        """The weight of a value with its aliases written out, and its depth; a text has depth 0."""
        if isinstance(value, str):
            return len(value) + _NODE, 0
        if id(value) in self.anchored:
            return self.anchored[id(value)][1:]
        inner: list[object] = []
        if isinstance(value, dict):
            inner = [*value, *value.values()]
        elif isinstance(value, list):
            inner = value
        sizes = [self.measure(one) for one in inner]
        return _NODE + sum(weight for weight, _ in sizes), 1 + max((height for _, height in sizes), default=0)

    def items(self, path: Path) -> Iterator[object]:
        index = 0
        quick = self.unwanted(path)
        while type(event := self.next_event()) is not yaml.SequenceEndEvent:
            if quick and _is_plain(event):
                yield _value(event)
            else:
                yield self.node(event, (*path, index))
            index += 1

    def mapping(self, path: Path) -> dict[str, object]:
        result: dict[str, object] = {}
        merged: list[tuple[Spot, object]] = []
        quick = self.unwanted(path)
        while type(event := self.next_event()) is not yaml.MappingEndEvent:
            key = event.value if _is_plain(event) else self.node(event, (*path, "?"))
            if key == _MERGE and _is_plain(event) and not event.style:
                merged.append((self.spot(event), self.node(self.next_event(), (*path, _MERGE))))
                continue
            if not isinstance(key, str):
                self.problems.add_at(self.spot(event), "a key must be text, found a list or a mapping")
                key = "?"
            elif key in result:
                self.problems.add_at(self.spot(event), f"the key {key!r} stands here a second time")
            if self.wanted and (target := Target((*path, key), key=True)) in self.wanted:
                self.spots.setdefault(target, self.spot(event))
            event = self.next_event()
            value = _value(event) if quick and _is_plain(event) else self.node(event, (*path, key))
            result.setdefault(key, value)
        for spot, value in merged:
            self.merge(result, value, spot, path)
        return result

    def merge(self, result: dict[str, object], value: object, spot: Spot, path: Path) -> None:
        """Add the keys of a mapping, or of each in a list of mappings, that `result` does not have by then."""
        for part in value if isinstance(value, list) else [value]:
            if not isinstance(part, dict):
                self.problems.add_at(spot, f"'{_MERGE}' takes the alias of a mapping, or a list of such")
                continue
            for key, item in part.items():
                if key not in result:
                    result[key] = item
                    for target in (Target((*path, key)), Target((*path, key), key=True)):
                        if target in self.wanted:
                            self.spots.setdefault(target, spot)

    def unwanted(self, path: Path) -> bool:
        """True inside a fact whose places nobody asked for: nearly always, and half the time is saved there."""
        return len(path) >= 2 and Target(path[:2]) not in self.wanted


def _is_plain(event: Any) -> bool:
    return type(event) is yaml.ScalarEvent and event.anchor is None and event.tag is None


def _value(event: Any) -> str:
    """A scalar's text. A folded block (>) ends in a line end that is there for the syntax alone."""
    text: str = event.value
    return text.rstrip("\n") if event.style == ">" else text


def _refuse_characters(text: str, name: str, kind: Kind) -> None:
    """Tabs outside comments and characters that YAML has no place for, all at once."""
    if "\t" not in text and not _UNREADABLE.search(text):
        return
    wrong = []
    for number, line in enumerate(text.split("\n"), 1):
        tab = line.find("\t")
        if tab >= 0 and not _IN_COMMENT.search(line[:tab]):
            advice = "indent with spaces" if not line[:tab].strip() else "use spaces, or \\t inside double quotes"
            wrong.append(f"{name}:{number}:{tab + 1}: a tab; {advice}")
        for found in _UNREADABLE.finditer(line):
            sign = f"U+{ord(found.group()):04X}"
            wrong.append(f"{name}:{number}:{found.start() + 1}: the character {sign} cannot stand in YAML")
    if wrong:
        raise bad_file(name, wrong, kind=kind)


def _explain(error: yaml.MarkedYAMLError, lines: Sequence[str]) -> str:
    """The parser's words, and what is most likely meant."""
    problem = error.problem or "no reason given"
    message = f"this is not valid YAML ({problem})"
    marks = [mark.line for mark in (error.problem_mark, error.context_mark) if mark]
    near = [lines[line] for line in marks if line < len(lines)]
    if any(_BARE_SLOT.search(line) for line in near):
        return f'{message}; a text that starts with {{}} needs quotes: "{{}} is ..."'
    if any(_BARE_SHORT.search(line) for line in near):
        return f'{message}; the short form needs quotes: "[Subject] is ... -> Target"'
    if "mapping values are not allowed" in problem:
        return f"{message}; a text with ': ' in it needs quotes, and keys of one fact start in one column"
    if "cannot start any token" in problem:
        return f"{message}; a text that starts with a sign such as @ or % needs quotes"
    if "end of stream" in problem and "quoted" in (error.context or ""):
        opened = error.context_mark
        return f"{message}; the quote opened in line {opened.line + 1} is never closed" if opened else message
    if error.context_mark and error.problem_mark and error.context_mark.line != error.problem_mark.line:
        return f"{message}, {error.context} that starts in line {error.context_mark.line + 1}"
    return message
