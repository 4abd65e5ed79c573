"""Facts to disk: YAML for people, JSON Lines for programs, or EasyEdit's flat JSON for its users.

The YAML is written here and not by `yaml.safe_dump`, which writes anchors where facts share a list, breaks texts at
line ends into several lines, and takes many times as long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kpatch.cache import atomic_write
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.facts.importers.counterfact import to_easyedit
from kpatch.outputs import check_new_file

# Words that need no quotes in any YAML reader: no signs with a meaning, nothing that reads as a number or yes or no
_PLAIN = re.compile(r"(?!(?:yes|no|true|false|null|on|off|y|n)$)[^\W\d_][\w ()'.,/&-]*(?<! )", re.IGNORECASE)
_ESCAPED = re.compile("[\x7f-\xa0\u2028\u2029\ufeff]")  # line ends and marks that YAML readers take for something else


def write_facts(path: str | Path, facts: Sequence[Fact], model: str | None = None, force: bool = False) -> None:
    """Write facts to a .yaml, .jsonl or .json file, whole or not at all; equal facts give equal files.

    Raises BadInput for another kind of file, Refused for one that exists unless `force`.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in WRITERS:
        raise BadInput(
            "Facts are not written to this kind of file",
            where=str(path),
            details=[f"expected a name in {', '.join(WRITERS)}; found {kind or 'none of them'}"],
        )
    check_new_file(path, force=force, what="a fact file")
    text = "".join(WRITERS[kind]([fact.to_dict() for fact in facts], model))

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", newline="\n")

    atomic_write(path, write)


def _yaml(facts: Sequence[dict[str, Any]], model: str | None) -> Iterator[str]:
    yield "version: 1\n"
    if model is not None:
        yield f"model: {_scalar(model)}\n"
    yield "facts:\n"
    for fact in facts:
        mark = "- "
        for key, value in fact.items():
            if isinstance(value, bool):
                yield f"{mark}{key}: {json.dumps(value)}\n"
            elif isinstance(value, str):
                yield f"{mark}{key}: {_scalar(value)}\n"
            else:
                yield f"{mark}{key}:\n"
                yield from (f"  - {_item(item)}\n" for item in value)
            mark = "  "


def _item(item: str | dict[str, str]) -> str:
    if isinstance(item, str):
        return quoted(item)
    return "{" + ", ".join(f"{key}: {quoted(value)}" for key, value in item.items()) + "}"


def _scalar(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else quoted(text)


def quoted(text: str) -> str:
    """A JSON string, which YAML reads alike."""
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def _lines(facts: Sequence[dict[str, Any]], _: str | None) -> Iterator[str]:
    for fact in facts:
        yield json.dumps(fact, ensure_ascii=False) + "\n"


def _flat(facts: Sequence[dict[str, Any]], _: str | None) -> Iterator[str]:
    rows = [json.dumps(to_easyedit(fact), ensure_ascii=False) for fact in facts]
    yield "[\n" + ",\n".join(rows) + "\n]\n"


WRITERS: dict[str, Callable[[Sequence[dict[str, Any]], str | None], Iterator[str]]] = {
    ".yaml": _yaml,
    ".yml": _yaml,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _flat,
}
