"""The manifest of a patch: what it says of itself, as frozen dataclasses and as one canonical JSON text. No torch.

Unknown keys are kept (a later kpatch may add some), an unknown format version is not read. The patch's id is the
SHA-256 of the canonical text, which contains the SHA-256 of every tensor. In the file the id stands beside the other
keys, so that not one character of a manifest can change unnoticed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kpatch.patch.text import JsonError, canonical, loads, plain, printable

FORMAT = 1
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
FORMS = ("lowrank", "dense")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")


class ManifestError(ValueError):
    """A manifest that breaks a rule; the message names the key and the rule."""


class NewerFormat(ManifestError):
    """A manifest of a format version that this kpatch does not know."""


@dataclass(frozen=True)
class BaseWeight:
    """One weight as the patch expects to find it: stored dtype and shape, SHA-256 of its bytes, sketch of values."""

    shape: tuple[int, int]
    dtype: str
    sha256: str
    sketch: tuple[float, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        own = {"shape": list(self.shape), "dtype": self.dtype, "sha256": self.sha256, "sketch": list(self.sketch)}
        return {**self.extra, **own}


@dataclass(frozen=True)
class Base:
    """The model a patch was made for. `tokenizer` is a hash, `weights` maps a weight's name to its BaseWeight."""

    name: str
    family: str
    weights: Mapping[str, BaseWeight]
    revision: str | None = None
    tokenizer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.extra,
            "name": self.name,
            "revision": self.revision,
            "family": self.family,
            "tokenizer": self.tokenizer,
            "weights": {name: weight.to_dict() for name, weight in self.weights.items()},
        }


@dataclass(frozen=True)
class DeltaInfo:
    """How one delta is stored and how large it is: Frobenius norm, and that norm over the norm of the weight."""

    form: str
    rank: int | None
    norm: float
    relative_norm: float
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        own = {"form": self.form, "rank": self.rank, "norm": self.norm, "relative_norm": self.relative_norm}
        return {**self.extra, **own}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file: dtype, shape, SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, int]
    sha256: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**self.extra, "dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


@dataclass(frozen=True)
class Manifest:
    """Everything a patch says of itself. `facts` are Fact.to_dict() objects, `parents` ids of patches it needs.

    `groups` are {facts: positions in `facts`, layers}: one for each row of the stored values, in order; the stored
    keys of a layer have a row for each group with that layer. Without groups there is one row a fact.
    """

    base: Base
    method: str
    layers: tuple[int, ...]
    deltas: Mapping[str, DeltaInfo]
    facts: tuple[Mapping[str, Any], ...] = ()
    groups: tuple[Mapping[str, Any], ...] = ()
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    covariance: Mapping[str, Any] | None = None
    parents: tuple[str, ...] = ()
    effect: Mapping[str, Any] | None = None
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    tool: str = "kpatch"
    format: int = FORMAT
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object without the id, unknown keys included."""
        return {
            **self.extra,
            "format": self.format,
            "tool": self.tool,
            "base": self.base.to_dict(),
            "method": self.method,
            "hyperparameters": self.hyperparameters,
            "layers": list(self.layers),
            "covariance": self.covariance,
            "facts": list(self.facts),
            **({"groups": list(self.groups)} if self.groups else {}),
            "parents": list(self.parents),
            "effect": self.effect,
            "deltas": {name: delta.to_dict() for name, delta in self.deltas.items()},
            "tensors": {name: tensor.to_dict() for name, tensor in self.tensors.items()},
        }

    def to_json(self) -> tuple[str, str]:
        """The canonical text with the id in it, and the id: SHA-256 of the canonical text without it, in hex.

        Raises ManifestError for values JSON cannot carry unchanged (NaN, a foreign type).
        """
        value = self.to_dict()
        try:
            identity = hashlib.sha256(canonical(value).encode("utf-8")).hexdigest()
            return canonical({**value, "id": identity}), identity
        except JsonError as error:
            raise ManifestError(f"the manifest holds {error}") from None

    @staticmethod
    def from_json(text: str) -> tuple[Manifest, str]:
        """Parse and validate; gives the id too. Raises ManifestError; NewerFormat for a version unknown here."""
        try:
            value = loads(text)
        except JsonError as error:
            raise ManifestError(f"the manifest: {error}") from None
        stated = value.pop("id", None) if isinstance(value, dict) else None
        manifest = Manifest.from_dict(value)
        written, identity = manifest.to_json()
        if stated != identity:
            raise ManifestError("manifest.id: is not the SHA-256 of the rest of the manifest")
        # One text per manifest: otherwise files with one meaning would not be one file.
        if written != text:
            raise ManifestError("the manifest is not in canonical form (keys sorted, no spaces, shortest numbers)")
        return manifest, identity

    @staticmethod
    def from_dict(value: Any) -> Manifest:
        """Validate a parsed object. Raises ManifestError; NewerFormat for a format version unknown here."""
        try:
            top = _Fields(plain(value), "manifest")
        except JsonError as error:
            raise ManifestError(f"the manifest holds {error}") from None
        version = top.integer("format", minimum=1)
        if version > FORMAT:
            raise NewerFormat(f"the patch has format {version}; this kpatch reads format {FORMAT}")
        return _manifest(top, version)


def is_sha256(text: object) -> bool:
    """Whether `text` is 64 lower-case hex digits (an id or a hash)."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def is_tensor_name(text: object) -> bool:
    """Whether `text` can name a weight: letters, digits, '_', '.', '-', at most 255 of them."""
    return isinstance(text, str) and _TENSOR_NAME.fullmatch(text) is not None


class _Fields:
    """One JSON object being read: typed access that remembers which keys were asked for."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ManifestError(f"{where}: wants an object")
        self.value, self.where, self.seen = value, where, set[str]()

    def error(self, key: str, rule: str) -> ManifestError:
        return ManifestError(f"{self.where}.{key}: {rule}")

    def any(self, key: str) -> Any:
        if key not in self.value:
            raise self.error(key, "is missing")
        self.seen.add(key)
        return self.value[key]

    def text(self, key: str) -> str:
        value = self.any(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "wants text")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.any(key) is None else self.text(key)

    def integer(self, key: str, minimum: int = 0) -> int:
        value = self.any(key)
        if type(value) is not int or value < minimum:
            raise self.error(key, f"wants a whole number of at least {minimum}")
        return value

    def amount(self, key: str) -> float:
        value = self.any(key)
        if type(value) not in (int, float) or value < 0:
            raise self.error(key, "wants a number of at least 0")
        return value  # type: ignore[no-any-return]  # as written: 1 must not come back as 1.0

    def sha256(self, key: str) -> str:
        value = self.any(key)
        if not is_sha256(value):
            raise self.error(key, "wants 64 lower-case hex digits")
        return str(value)

    def dtype(self, key: str) -> str:
        value = self.any(key)
        if value not in FLOAT_DTYPES:
            raise self.error(key, f"wants one of {', '.join(FLOAT_DTYPES)}")
        return str(value)

    def shape(self, key: str) -> tuple[int, int]:
        value = self.any(key)
        if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n >= 1 for n in value):
            raise self.error(key, "wants two sizes of at least 1")
        return value[0], value[1]

    def object(self, key: str) -> dict[str, Any]:
        value = self.any(key)
        if not isinstance(value, dict):
            raise self.error(key, "wants an object")
        return value

    def optional_object(self, key: str) -> dict[str, Any] | None:
        return None if self.any(key) is None else self.object(key)

    def array(self, key: str) -> list[Any]:
        value = self.any(key)
        if not isinstance(value, list):
            raise self.error(key, "wants a list")
        return value

    def each(self, key: str) -> list[tuple[str, _Fields]]:
        """The entries of an object that maps tensor names to objects."""
        found = []
        for name, value in self.object(key).items():
            if not is_tensor_name(name):
                raise self.error(key, f"{printable(name, 80)!r} cannot name a tensor")
            found.append((name, _Fields(value, f"{self.where}.{key}[{name}]")))
        return found

    def rest(self) -> dict[str, Any]:
        return {key: value for key, value in self.value.items() if key not in self.seen}


def _manifest(top: _Fields, version: int) -> Manifest:
    covariance = top.optional_object("covariance")
    if covariance is not None:
        fields = _Fields(covariance, "manifest.covariance")
        fields.text("id")
        fields.text("corpus")
        fields.integer("tokens")
    layers = top.array("layers")
    if not all(type(layer) is int and layer >= 0 for layer in layers) or sorted(set(layers)) != layers:
        raise top.error("layers", "wants rising layer numbers")
    parents = top.array("parents")
    if not all(is_sha256(parent) for parent in parents) or len(set(parents)) != len(parents):
        raise top.error("parents", "wants distinct patch ids of 64 hex digits")
    return Manifest(
        format=version,
        tool=top.text("tool"),
        base=_base(_Fields(top.object("base"), "manifest.base")),
        method=top.text("method"),
        hyperparameters=top.object("hyperparameters"),
        layers=tuple(layers),
        covariance=covariance,
        facts=tuple(_fact(fact, number) for number, fact in enumerate(top.array("facts"))),
        groups=tuple(_group(group, number) for number, group in enumerate(_groups(top))),
        parents=tuple(parents),
        effect=top.optional_object("effect"),
        deltas={name: _delta(fields) for name, fields in top.each("deltas")},
        tensors={name: _tensor(fields) for name, fields in top.each("tensors")},
        extra=top.rest(),
    )


def _base(base: _Fields) -> Base:
    name = base.text("name")
    if os.path.isabs(name) or "\\" in name:
        raise base.error("name", "wants a model's name, not a path on one machine")
    weights = {}
    for key, weight in base.each("weights"):
        sketch = weight.array("sketch")
        if not all(type(number) in (int, float) for number in sketch):
            raise weight.error("sketch", "wants numbers")
        weights[key] = BaseWeight(
            weight.shape("shape"), weight.dtype("dtype"), weight.sha256("sha256"), tuple(sketch), weight.rest()
        )
    return Base(
        name,
        base.text("family"),
        weights,
        base.optional_text("revision"),
        base.optional_text("tokenizer"),
        base.rest(),
    )


def _fact(value: Any, number: int) -> Mapping[str, Any]:
    fact = _Fields(value, f"manifest.facts[{number}]")
    for key in ("subject", "prompt", "target"):
        fact.text(key)
    return fact.value


def _groups(top: _Fields) -> list[Any]:
    return top.array("groups") if "groups" in top.value else []


def _group(value: Any, number: int) -> Mapping[str, Any]:
    group = _Fields(value, f"manifest.groups[{number}]")
    for key in ("facts", "layers"):
        if not group.array(key) or not all(type(index) is int and index >= 0 for index in group.array(key)):
            raise group.error(key, "wants numbers from 0")
    return group.value


def _delta(delta: _Fields) -> DeltaInfo:
    form = delta.text("form")
    if form not in FORMS:
        raise delta.error("form", f"wants one of {', '.join(FORMS)}")
    rank = None if delta.any("rank") is None else delta.integer("rank", minimum=1)
    return DeltaInfo(form, rank, delta.amount("norm"), delta.amount("relative_norm"), delta.rest())


def _tensor(tensor: _Fields) -> TensorInfo:
    return TensorInfo(tensor.dtype("dtype"), tensor.shape("shape"), tensor.sha256("sha256"), tensor.rest())
