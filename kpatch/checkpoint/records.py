"""The records of a .kpatch folder, applied.json and journal.json: what they hold, and how they are read. No torch.

A record that is not as kpatch writes it raises ValueError, KeyError, TypeError or AttributeError while it is read;
`Store`, which knows the file, makes one error of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kpatch.patch.fields import FLOAT_DTYPES, is_sha256

VERSION = 2


class NewerRecord(Exception):
    """A record that a later kpatch wrote."""


@dataclass(frozen=True)
class AppliedPatch:
    """A patch on the stack: id, the name it was given by, number of facts, ids of patches it needs.

    `replaces` are facts of earlier patches that its own stand for while it is there: positions by patch id.
    """

    id: str
    name: str
    facts: int
    parents: tuple[str, ...] = ()
    replaces: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        own = {"id": self.id, "name": self.name, "facts": self.facts, "parents": list(self.parents)}
        replaced = {identity: list(facts) for identity, facts in self.replaces.items()}
        return {**own, **({"replaces": replaced} if replaced else {})}


def replaced_by(patches: Iterable[AppliedPatch]) -> dict[str, set[int]]:
    """The facts that any of the patches stands for: positions by patch id."""
    found: dict[str, set[int]] = {}
    for patch in patches:
        for identity, facts in patch.replaces.items():
            found.setdefault(identity, set()).update(facts)
    return found


@dataclass(frozen=True)
class AppliedWeight:
    """A changed weight: stored dtype and shape, SHA-256 of its bytes as they were and as kpatch left them, and the ids
    of the patches that change it, sorted; `joint` where some of them were solved together."""

    dtype: str
    shape: tuple[int, ...]
    base: str
    after: str
    patches: tuple[str, ...] = ()
    joint: bool = False

    def to_dict(self) -> dict[str, Any]:
        own = {"dtype": self.dtype, "shape": list(self.shape), "base": self.base, "after": self.after}
        return {**own, "patches": list(self.patches), **({"joint": True} if self.joint else {})}


@dataclass(frozen=True)
class LogEntry:
    """A line of the log: time (UTC), "apply" or "revert", and the (id, name) of each patch that came or went."""

    time: str
    action: str
    patches: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        patches = [{"id": identity, "name": name} for identity, name in self.patches]
        return {"time": self.time, "action": self.action, "patches": patches}


@dataclass(frozen=True)
class Applied:
    """applied.json: the base's name, the stack bottom to top, changed weights by stored name, what was done so far."""

    base: str | None = None
    patches: tuple[AppliedPatch, ...] = ()
    weights: Mapping[str, AppliedWeight] = field(default_factory=dict)
    log: tuple[LogEntry, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        joint = any(weight.joint for weight in self.weights.values())
        return {
            "version": VERSION if joint else 1,  # a kpatch that only adds up must not take one of them off
            "base": self.base,
            "patches": [patch.to_dict() for patch in self.patches],
            "weights": {name: weight.to_dict() for name, weight in self.weights.items()},
            "log": [entry.to_dict() for entry in self.log],
        }

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(patch.id for patch in self.patches)

    @property
    def gone(self) -> dict[str, set[int]]:
        """Facts that a later patch stands for: positions by patch id."""
        return replaced_by(self.patches)

    @staticmethod
    def from_dict(value: Any) -> Applied:
        """Parse and check applied.json. Raises NewerRecord too."""
        if type(value["version"]) is int and value["version"] > VERSION:
            raise NewerRecord
        patches = tuple(
            AppliedPatch(
                _sha(patch["id"]),
                str(patch["name"]),
                _count(patch["facts"]),
                tuple(map(_sha, patch["parents"])),
                {_sha(other): tuple(map(_count, facts)) for other, facts in patch.get("replaces", {}).items()},
            )
            for patch in value["patches"]
        )
        ids = {patch.id for patch in patches}
        if len(ids) != len(patches):
            raise ValueError("a patch twice")
        weights = {name: _applied_weight(weight) for name, weight in value["weights"].items()}
        if any(not weight.patches or not ids.issuperset(weight.patches) for weight in weights.values()):
            raise ValueError("a weight changed by no applied patch")
        if not isinstance(value["base"], str | None):
            raise ValueError("base")
        log = tuple(_log_entry(entry) for entry in value.get("log", []))
        return Applied(value["base"], patches, weights, log)


@dataclass(frozen=True)
class Staged:
    """The successor of a weight file: its size in bytes, and the SHA-256 of every weight that was written anew."""

    size: int
    weights: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {"size": self.size, "weights": dict(self.weights)}


@dataclass(frozen=True)
class Journal:
    """journal.json: what is being committed. `files` maps a weight file to what is staged for it."""

    action: str
    patches: tuple[str, ...]
    files: Mapping[str, Staged]
    applied: Applied

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "action": self.action,
            "patches": list(self.patches),
            "files": {name: staged.to_dict() for name, staged in self.files.items()},
            "applied": self.applied.to_dict(),
        }

    @staticmethod
    def from_dict(value: Any) -> Journal:
        """Parse and check journal.json. Raises NewerRecord too."""
        return Journal(
            str(value["action"]),
            tuple(str(patch) for patch in value["patches"]),
            {_weight_file(name): _staged(staged) for name, staged in value["files"].items()},
            Applied.from_dict(value["applied"]),
        )


def _applied_weight(value: Any) -> AppliedWeight:
    return AppliedWeight(
        _dtype(value["dtype"]),
        tuple(map(_count, value["shape"])),
        _sha(value["base"]),
        _sha(value["after"]),
        tuple(map(_sha, value["patches"])),
        value.get("joint", False) is True,
    )


def _weight_file(name: str) -> str:
    if not name.endswith(".safetensors") or set(name) & set("/\\:\0"):
        raise ValueError("not a weight file")
    return name


def _staged(value: Any) -> Staged:
    if type(value["size"]) is not int:
        raise ValueError("not a size")
    return Staged(value["size"], {str(name): _sha(sha256) for name, sha256 in value["weights"].items()})


def _log_entry(value: Any) -> LogEntry:
    patches = tuple((_sha(patch["id"]), str(patch["name"])) for patch in value["patches"])
    return LogEntry(str(value["time"]), str(value["action"]), patches)


def _sha(value: object) -> str:
    if not is_sha256(value):
        raise ValueError("not a SHA-256")
    return str(value)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("not a number of things")
    return value


def _dtype(value: object) -> str:
    if value not in FLOAT_DTYPES:
        raise ValueError("not a float dtype")
    return str(value)
