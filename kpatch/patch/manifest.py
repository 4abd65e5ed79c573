"""The manifest of a patch: what it says of itself, as frozen dataclasses and as one canonical JSON text. No torch.

Unknown keys are kept (a later kpatch may add some), an unknown format version is not read. The patch's id is the
SHA-256 of the canonical text, which contains the SHA-256 of every tensor. In the file the id stands beside the other
keys, so that not one character of a manifest can change unnoticed.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kpatch.patch.canonical_json import JsonError, canonical, canonical_object, loads, plain
from kpatch.patch.fields import Fields, ManifestError, is_sha256

FORMAT = 1
# A patch with rows of no fact of its own, which earlier kpatch versions cannot read
WITH_HELD_ROWS = 2
FORMS = ("lowrank", "dense")


class NewerFormat(ManifestError):
    """A manifest of a format version that this kpatch does not know."""


@dataclass(frozen=True)
class BaseWeight:
    """One weight as the patch expects to find it: stored dtype and shape, SHA-256 of its bytes, sketch of values.

    A delta is a matrix whatever the weight's number of dimensions: see `matrix_shape`. `transposed` says whether the
    weight is stored [in, out]; None where the manifest does not say: see `stored_transposed`.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    sketch: tuple[float, ...] = ()
    transposed: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        own = {"shape": list(self.shape), "dtype": self.dtype, "sha256": self.sha256, "sketch": list(self.sketch)}
        said = {} if self.transposed is None else {"transposed": self.transposed}
        return {**self.extra, **own, **said}


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
    """How one delta is stored and how large it is: Frobenius norm, and that norm over the norm of the weight.

    `by_row`: its factors have a column and a row for each row of the layer's stored keys (`kpatch.patch.joint`).
    """

    form: str
    rank: int | None
    norm: float
    relative_norm: float
    extra: Mapping[str, Any] = field(default_factory=dict)
    by_row: bool = False

    def to_dict(self) -> dict[str, Any]:
        own = {"form": self.form, "rank": self.rank, "norm": self.norm, "relative_norm": self.relative_norm}
        return {**self.extra, **own, **({"by_row": True} if self.by_row else {})}


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
    keys of a layer have a row for each group with that layer. Without groups there is one row a fact. A group without
    facts is a fact of a parent that is asked for again.
    `stack` says which patches this one holds, if it was made of others: {id, scale, facts, method, hyperparameters,
    layers, covariance} of each that was no stack itself. `protect` are {subject, prompt, weight} of what was held.
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
    stack: tuple[Mapping[str, Any], ...] = ()
    protect: tuple[Mapping[str, Any], ...] = ()
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
            **({"stack": list(self.stack)} if self.stack else {}),
            **({"protect": list(self.protect)} if self.protect else {}),
            "parents": list(self.parents),
            "effect": self.effect,
            "deltas": {name: delta.to_dict() for name, delta in self.deltas.items()},
            "tensors": {name: tensor.to_dict() for name, tensor in self.tensors.items()},
        }

    def layer_of(self, weight: str) -> int | None:
        """The layer that a weight of this patch is in, None for one outside the layers (an embedding)."""
        return layer_in(weight, self.layers)

    def transposed(self, weight: str) -> bool:
        """Whether the checkpoint stores a weight of this patch as [in, out]."""
        return stored_transposed(self.base.family, weight, self.base.weights[weight])

    def holds(self, identity: str) -> frozenset[str]:
        """Ids of the patches whose deltas this one adds up: of those stacked in it, else `identity`, its own."""
        return frozenset(str(part["id"]) for part in self.stack) or frozenset((identity,))

    def to_json(self) -> tuple[str, str]:
        """The canonical text with the id in it, and the id: SHA-256 of the canonical text without it, in hex.

        Raises ManifestError for values JSON cannot carry unchanged (NaN, a foreign type).
        """
        try:
            parts = {key: canonical(child, 1) for key, child in self.to_dict().items()}
            identity = hashlib.sha256(canonical_object(parts).encode("utf-8")).hexdigest()
            return canonical_object({**parts, "id": canonical(identity)}), identity
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
        manifest = _read(value)
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
            return _read(plain(value))
        except JsonError as error:
            raise ManifestError(f"the manifest holds {error}") from None


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape [rows, cols] in which a weight is patched: cols is its last dimension, rows all others together."""
    return math.prod(shape[:-1]), shape[-1]


def stored_transposed(family: str, name: str, weight: BaseWeight) -> bool:
    """Whether the checkpoint stores a weight as [in, out] (Conv1D) instead of [out, in].

    The manifest says so; where it does not, all matrices in the layers of GPT-2 are stored so, and no others.
    """
    if weight.transposed is not None:
        return weight.transposed
    return family == "gpt2" and layer_in(name) is not None and len(weight.shape) == 2


def layer_in(name: str, layers: Collection[int] | None = None) -> int | None:
    """The layer of a weight: the first number between the dots of its name, of those in `layers` where given."""
    numbers = (int(part) for part in name.split(".") if part.isascii() and part.isdecimal())
    return next((number for number in numbers if layers is None or number in layers), None)


def _read(value: Any) -> Manifest:
    """The manifest of an object that JSON can carry."""
    top = Fields(value, "manifest")
    version = top.integer("format", minimum=1)
    if version > WITH_HELD_ROWS:
        raise NewerFormat(f"the patch has format {version}; this kpatch reads format {WITH_HELD_ROWS}")
    return _manifest(top, version)


def _manifest(top: Fields, version: int) -> Manifest:
    covariance = top.optional_object("covariance")
    if covariance is not None:
        fields = Fields(covariance, "manifest.covariance")
        fields.text("id")
        fields.text("corpus")
        fields.integer("tokens")
    layers = top.array("layers")
    if not all(type(layer) is int and layer >= 0 for layer in layers) or sorted(set(layers)) != layers:
        raise top.error("layers", "must be rising layer numbers")
    parents = top.array("parents")
    if not all(is_sha256(parent) for parent in parents) or len(set(parents)) != len(parents):
        raise top.error("parents", "must be distinct patch ids of 64 hex digits")
    facts = tuple(_fact(fact, number) for number, fact in enumerate(top.array("facts")))
    stack = tuple(_stacked(part, number) for number, part in enumerate(_optional_list(top, "stack")))
    if len({part["id"] for part in stack}) != len(stack):
        raise top.error("stack", "must be distinct patches")
    return Manifest(
        format=version,
        tool=top.text("tool"),
        base=_base(Fields(top.object("base"), "manifest.base")),
        method=top.text("method"),
        hyperparameters=top.object("hyperparameters"),
        layers=tuple(layers),
        covariance=covariance,
        facts=facts,
        groups=tuple(
            _group(group, number, len(facts), version) for number, group in enumerate(_optional_list(top, "groups"))
        ),
        stack=stack,
        protect=tuple(_protected(one, number) for number, one in enumerate(_optional_list(top, "protect"))),
        parents=tuple(parents),
        effect=top.optional_object("effect"),
        deltas={name: _delta(fields) for name, fields in top.each("deltas")},
        tensors={name: _tensor(fields) for name, fields in top.each("tensors")},
        extra=top.rest(),
    )


def _base(base: Fields) -> Base:
    name = base.text("name")
    if os.path.isabs(name) or "\\" in name:
        raise base.error("name", "must be a model's name, not a path on one machine")
    weights = {}
    for key, weight in base.each("weights"):
        sketch = weight.array("sketch")
        if not all(type(number) in (int, float) for number in sketch):
            raise weight.error("sketch", "must be numbers")
        weights[key] = BaseWeight(
            weight.sizes("shape"),
            weight.dtype("dtype"),
            weight.sha256("sha256"),
            tuple(sketch),
            weight.flag("transposed") if "transposed" in weight.value else None,
            weight.rest(),
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
    fact = Fields(value, f"manifest.facts[{number}]")
    for key in ("subject", "prompt", "target"):
        fact.text(key)
    return fact.value


def _optional_list(top: Fields, key: str) -> list[Any]:
    return top.array(key) if key in top.value else []


def _protected(value: Any, number: int) -> Mapping[str, Any]:
    one = Fields(value, f"manifest.protect[{number}]")
    one.text("subject")
    if "prompt" in value:
        one.text("prompt")
    weight = value.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise one.error("weight", "must be a number above 0")
    return dict(value)


def _stacked(value: Any, number: int) -> Mapping[str, Any]:
    part = Fields(value, f"manifest.stack[{number}]")
    part.sha256("id")
    part.text("method")
    part.integer("facts")
    part.object("hyperparameters")
    if part.amount("scale") == 0:
        raise part.error("scale", "must be a number above 0")
    return part.value


def _group(value: Any, number: int, facts: int, version: int) -> Mapping[str, Any]:
    group = Fields(value, f"manifest.groups[{number}]")
    for key in ("facts", "layers"):
        missing = not group.array(key) and (key == "layers" or version < WITH_HELD_ROWS)
        if missing or not all(type(index) is int and index >= 0 for index in group.array(key)):
            raise group.error(key, "must be numbers from 0")
    if max(group.array("facts"), default=-1) >= facts:
        raise group.error("facts", f"must be positions among the {facts} facts")
    return group.value


def _delta(delta: Fields) -> DeltaInfo:
    form = delta.text("form")
    if form not in FORMS:
        raise delta.error("form", f"must be one of {', '.join(FORMS)}")
    rank = None if delta.any("rank") is None else delta.integer("rank", minimum=1)
    by_row = "by_row" in delta.value and delta.flag("by_row")
    if "by_row" in delta.value and not (by_row and form == "lowrank"):
        raise delta.error("by_row", "must be true, of a low-rank delta, or missing")
    return DeltaInfo(form, rank, delta.amount("norm"), delta.amount("relative_norm"), delta.rest(), by_row)


def _tensor(tensor: Fields) -> TensorInfo:
    return TensorInfo(tensor.dtype("dtype"), tensor.shape("shape"), tensor.sha256("sha256"), tensor.rest())
