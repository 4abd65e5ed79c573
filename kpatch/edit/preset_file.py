"""Preset files: settings of a method for one model as a small YAML file, which `kpatch tune` writes and people share.

Format version 1, described in docs/tune.md. Reading needs no torch but for the method's own module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, get_args

from kpatch.edit.methods import check_layers, method_named, method_names, with_settings
from kpatch.errors import BadInput
from kpatch.facts.check import absent, kind_of
from kpatch.facts.load import read_text
from kpatch.facts.problems import Kind, Path, Problems, Spot, Target, at, cut, did_you_mean
from kpatch.facts.wordings import Mode
from kpatch.facts.write import quoted
from kpatch.facts.yaml_tree import locate, read
from kpatch.reporter import Reporter
from kpatch.text import parse_ranges, ranges

if TYPE_CHECKING:
    from kpatch.models.model import Model

VERSION = "1"
SUFFIXES = (".yaml", ".yml")
KEYS = ("version", "method", "model", "layers", "settings", "wordings", "notes", "measured")
MODEL_KEYS = ("title", "family", "width", "depth", "weights")
_KIND = Kind("preset file", "docs/tune.md")
_HASH = re.compile("[0-9a-f]{64}")
_PLAIN = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)  # what needs no quotes in YAML, as all is text here


@dataclass(frozen=True)
class TunedOn:
    """The model that settings were found on: its shape, and the fingerprint of its weights; None where unknown."""

    title: str | None = None
    family: str | None = None
    width: int | None = None
    depth: int | None = None
    weights: str | None = None

    def differences(self, model: Model) -> list[str]:
        """What of the shape differs from `model`, in words; what is not known differs from nothing."""
        pairs = (
            ("family", self.family, model.family.model_type),
            ("width", self.width, model.width),
            ("depth", self.depth, model.n_layers),
        )
        return [f"{name} {own}, not {other}" for name, own, other in pairs if own is not None and own != other]


@dataclass(frozen=True)
class PresetFile:
    """What a preset file says. `settings` are texts by name, as `--set` takes them; `measured` is free.

    layers  R, or None   wordings  none, given, auto, or None   name  the file's own, for messages
    """

    method: str
    model: TunedOn = TunedOn()
    layers: tuple[int, ...] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    wordings: str | None = None
    notes: str | None = None
    measured: Any = None
    name: str = field(default="", compare=False)
    layers_at: Spot = field(default=Spot(1, 1), compare=False)

    def check(self, model: Model, report: Reporter, own_layers: bool = False) -> None:
        """Note what the file holds, and that it was tuned on another model where its shape differs.

        Raises BadInput, with the place, for layers that the model lacks; `own_layers` says that others are taken.
        """
        parts = [f"layers {ranges(self.layers)}"] if self.layers is not None else []
        parts += [f"{key} {value}" for key, value in self.settings.items()]
        report.note(f"preset file {self.name}, tuned on {self.model.title or 'a model it does not name'}")
        report.note(f"it sets {', '.join(parts) or 'nothing'}")
        different = self.model.differences(model)
        if different:
            report.note(f"{self.name} was tuned on another model than {model.name}: {'; '.join(different)}")
        if self.layers is None or own_layers:
            return
        where = at(self.name, self.layers_at)
        if max(self.layers) >= model.n_layers:
            raise BadInput(
                f"The preset file names layer {max(self.layers)}, and {model.name} ends with layer"
                f" {model.n_layers - 1}",
                where=where,
                details=different,
                hint="give `layers` of this model, or tune it: `kpatch tune MODEL`",
            )
        try:
            check_layers(model, self.layers, last=method_named(self.method).writes_last)
        except BadInput as error:
            raise BadInput(error.message, where=where, details=error.details, hint=error.hint) from error

    def text(self) -> str:
        """The file, as `read_preset` reads it back."""
        model = {key: getattr(self.model, key) for key in MODEL_KEYS}
        data = {
            "version": VERSION,
            "method": self.method,
            "model": {key: value for key, value in model.items() if value is not None} or None,
            "layers": None if self.layers is None else ranges(self.layers).replace(" ", ""),
            "settings": dict(self.settings) or None,
            "wordings": self.wordings,
            "notes": self.notes,
            "measured": self.measured,
        }
        return "\n".join(_lines({key: value for key, value in data.items() if value is not None}, 0)) + "\n"


def read_preset(path: str | FilePath) -> PresetFile:
    """Read and check a preset file.

    Raises BadInput with every mistake as "file:line:column: message".
    """
    name = str(path)
    text = read_text(FilePath(path), SUFFIXES, _KIND)
    problems = Problems(_KIND)
    tree = read(text, name, problems)
    found = _Checker(problems).file(tree.data)
    problems.raise_any(name, lambda wanted: locate(text, name, wanted))
    return replace(found, name=name, layers_at=tree.spot(Target(("layers",))))


class _Checker:
    """Turns the file's data into a PresetFile; what is wrong goes to `problems`."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    def file(self, data: object) -> PresetFile:
        if not isinstance(data, Mapping) or not data:
            self.problems.add((), f"expected 'version:', 'method:' and settings, found {kind_of(data)}")
            return PresetFile("memit")
        self.unknown(data, KEYS, (), "a preset file")
        version = self.needed(data, "version")
        if version not in ("", VERSION):
            self.problems.add(("version",), f"this kpatch reads version {VERSION}, found {cut(repr(version))}")
        method = self.needed(data, "method")
        if method and method not in method_names():
            others = f"; there are {', '.join(method_names())}"
            message = f"unknown method {cut(method)!r}{did_you_mean(method, method_names(), others)}"
            self.problems.add(("method",), message)
            method = ""
        return PresetFile(
            method=method,
            model=self.model(data),
            layers=self.layers(data),
            settings=self.settings(data, method),
            wordings=self.wordings(data),
            notes=self.text(data, "notes"),
            measured=data.get("measured"),
        )

    def model(self, data: Mapping[str, Any]) -> TunedOn:
        inner = self.mapping(data, "model")
        self.unknown(inner, MODEL_KEYS, ("model",), "a model")
        weights = self.text(inner, "weights", ("model",))
        if weights is not None and not _HASH.fullmatch(weights):
            self.problems.add(("model", "weights"), f"expected 64 hexadecimal digits, found {cut(repr(weights))}")
        return TunedOn(
            title=self.text(inner, "title", ("model",)),
            family=self.text(inner, "family", ("model",)),
            width=self.number(inner, "width"),
            depth=self.number(inner, "depth"),
            weights=weights,
        )

    def layers(self, data: Mapping[str, Any]) -> tuple[int, ...] | None:
        """R as `4-8`, `4,5,6`, or a list of numbers."""
        if absent(data, "layers"):
            return None
        value = data["layers"]
        text = ",".join(str(item) for item in value) if isinstance(value, list) else value
        try:
            if not isinstance(text, str):
                raise ValueError(kind_of(value))
            return tuple(parse_ranges(text))
        except ValueError as error:
            self.problems.add(("layers",), f"expected layers such as 4-8 or [4, 5, 6], found {cut(str(error))!r}")
            return None

    def settings(self, data: Mapping[str, Any], method: str) -> dict[str, str]:
        """Each is checked by the rules of the method, if that is known."""
        inner = self.mapping(data, "settings")
        found: dict[str, str] = {}
        empty = method_named(method).hyper(layers=()) if method else None
        known = [each.name for each in fields(empty) if each.name != "layers"] if empty is not None else []
        for key in inner:
            text = self.text(inner, key, ("settings",))
            if empty is not None and key not in known:
                others = f"; {method} has {', '.join(known) or 'none'}"
                message = f"unknown setting {cut(key)!r}{did_you_mean(key, known, others)}"
                self.problems.add(("settings", key), message, key=True)
            elif absent(inner, key):
                self.problems.add(("settings", key), f"the setting {key} has no value")
            elif text is not None:
                found[key] = text
                if empty is None:
                    continue
                try:
                    with_settings(empty, {key: text})
                except BadInput as error:
                    self.problems.add(("settings", key), "; ".join([error.message, *error.details]))
        return found

    def wordings(self, data: Mapping[str, Any]) -> str | None:
        text = self.text(data, "wordings")
        if text is not None and text not in get_args(Mode):
            others = f"; expected one of {', '.join(get_args(Mode))}"
            self.problems.add(
                ("wordings",), f"unknown wordings {cut(text)!r}{did_you_mean(text, get_args(Mode), others)}"
            )
        return text

    def mapping(self, data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        if absent(data, key):
            return {}
        value = data[key]
        if not isinstance(value, Mapping):
            self.problems.add((key,), f"expected a mapping, found {kind_of(value)}")
            return {}
        return value

    def needed(self, data: Mapping[str, Any], key: str) -> str:
        if absent(data, key):
            self.problems.add((key,) if key in data else (), f"{key!r} is missing")
            return ""
        return self.text(data, key) or ""

    def text(self, data: Mapping[str, Any], key: str, path: Path = ()) -> str | None:
        if absent(data, key):
            return None
        value = data[key]
        if not isinstance(value, str):
            self.problems.add((*path, key), f"expected text, found {kind_of(value)}")
            return None
        return value.strip()

    def number(self, data: Mapping[str, Any], key: str) -> int | None:
        text = self.text(data, key, ("model",))
        if text is None or (text.isascii() and text.isdigit() and int(text) > 0):
            return None if text is None else int(text)
        self.problems.add(("model", key), f"expected a whole number above 0, found {cut(repr(text))}")
        return None

    def unknown(self, data: Mapping[str, Any], known: Sequence[str], path: Path, what: str) -> None:
        for key in data:
            if key not in known:
                others = f"; {what} has {', '.join(known)}"
                self.problems.add(
                    (*path, key), f"unknown key {cut(key)!r}{did_you_mean(key, known, others)}", key=True
                )


def _lines(value: object, indent: int) -> list[str]:
    """Lists, mappings and plain values as lines of YAML."""
    before = " " * indent
    if isinstance(value, Mapping):
        rows = []
        for key, item in value.items():
            nested = isinstance(item, Mapping | list | tuple) and len(item) > 0
            name = f"{before}{_scalar(key)}:"
            rows += [name, *_lines(item, indent + 2)] if nested else [f"{name} {_scalar(item)}"]
        return rows
    if isinstance(value, list | tuple):
        return [f"{before}- {_scalar(item)}" for item in value]
    return [f"{before}{_scalar(value)}"]


def _scalar(value: object) -> str:
    """A value on one line: words and numbers as they are, other texts in quotes, lists and mappings in brackets."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(key)}: {_scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else quoted(text)
