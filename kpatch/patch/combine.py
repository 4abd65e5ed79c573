"""Several patches together: their facts as one list, their one base, and the rows for solving their facts again.

Here are also the two rules for what goes together: no fact may contradict another patch's, and none may count twice.
`apply` asks for them before it needs torch, which is imported only where numbers are compared or rows are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kpatch.errors import KpatchError, Refused
from kpatch.facts.conflicts import contradictions, normal, what_is_shared
from kpatch.facts.fact import fill
from kpatch.patch.header import KEYS, VALUES, PatchInfo, read_header
from kpatch.patch.manifest import Base, BaseWeight
from kpatch.patch.sources import PatchSource
from kpatch.patch.weight_names import one_name_each
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from kpatch.patch.format import Patch

_SHOWN = 10

# A patch under the name that its user knows; the kept copy of an applied one is called by its id on disk.
Named = tuple[str, PatchInfo]


@dataclass(frozen=True)
class Repeated:
    """A fact that several patches hold: its text, its target, and their positions among the patches."""

    text: str
    target: str
    patches: tuple[int, ...]


@dataclass(frozen=True)
class FactUnion:
    """All facts of some patches, each once; `places[i][j]` is the position in `facts` of fact j of patch i."""

    facts: tuple[Mapping[str, Any], ...]
    places: tuple[tuple[int, ...], ...]
    repeated: tuple[Repeated, ...]


def read_together(patches: Iterable[PatchSource]) -> tuple[PatchInfo, ...]:
    """The headers of several patches, with one name for each weight: that of the first patch that changes it.

    A patch made for a text model and one made for a model with vision around it name the same weights otherwise.
    Raises BadInput, Damaged or Refused where one cannot be read.
    """
    infos = [read_header(patch) for patch in patches]
    names = one_name_each(info.manifest.base.weights for info in infos)
    return tuple(
        info.renamed(own) if any(name != other for name, other in own.items()) else info
        for info, own in zip(infos, names, strict=True)
    )


def place(fact: Mapping[str, Any]) -> tuple[str, str]:
    """What a fact is about: its subject and its prompt, for comparing."""
    return normal(fact["subject"]), normal(fact["prompt"])


def text_of(fact: Mapping[str, Any]) -> str:
    """The prompt with the subject in place."""
    return fill(str(fact["prompt"]), str(fact["subject"]))


def called(info: PatchInfo, name: str | None = None) -> str:
    """A patch by its file's name, or by another one, and the beginning of its id."""
    return f"{printable(name, 80) if name else info.name} ({info.id[:12]})"


def refuse_contradictions(
    patches: Sequence[Named],
    hint: str = "take those facts out of one of the fact files and make that patch again",
    without: Mapping[str, Collection[int]] | None = None,
) -> None:
    """Raise Refused with both patches of every contradiction, as `kpatch.facts.conflicts` defines it.

    What one patch says in itself is its maker's business and is not looked at. `without` are facts that do not count:
    positions by patch id.
    """
    gone = without or {}
    owned = [
        (number, fact)
        for number, (_, info) in enumerate(patches)
        for index, fact in enumerate(info.manifest.facts)
        if index not in gone.get(info.id, ())
    ]
    clashes = contradictions([fact for _, fact in owned], [number for number, _ in owned])
    if not clashes:
        return
    names = [called(info, name) for name, info in patches]
    lines = []
    for clash in clashes[:_SHOWN]:
        sides = [owned[clash.earlier], owned[clash.later]]
        says = " but ".join(f"{printable(str(fact['target']), 80)!r} in {names[number]}" for number, fact in sides)
        lines.append(f"{printable(what_is_shared(sides[1][1], clash.shared), 120)}: {says}")
    more = [f"… and {len(clashes) - _SHOWN} more"] if len(clashes) > _SHOWN else []
    first, second = (names[owned[index][0]] for index in clashes[0][:2])
    raise Refused(f"{first} and {second} contradict each other", details=lines + more, hint=hint)


def counted_twice(held: Sequence[Collection[str]]) -> tuple[int, int, str] | None:
    """The first two of some patches that hold the same patch, and its id, given what each holds; None where no delta
    would be added twice. A patch holds itself, or what is stacked in it: see `Manifest.holds`."""
    holder: dict[str, int] = {}
    for number, parts in enumerate(held):
        for part in sorted(parts):
            if part in holder:
                return holder[part], number, part
            holder[part] = number
    return None


def refuse_twice(patches: Sequence[Named], applied: int = 0, model: str = "") -> None:
    """Raise Refused where a patch's delta would count twice; the first `applied` are on the checkpoint `model`."""
    found = counted_twice([info.manifest.holds(info.id) for _, info in patches])
    if found is None:
        return
    first, second, part = found
    (name, info), (other_name, other) = patches[first], patches[second]
    if info.id == other.id and first < applied:
        raise Refused(
            f"{other.path} is already applied to {model}",
            details=[f"patch {info.id[:12]}"],
            hint=f"`kpatch status {model}` lists what is applied",
        )
    raise Refused(
        f"{other.path} is given twice"
        if info.id == other.id
        else f"{called(info, name)} and {called(other, other_name)} both hold patch {part[:12]}",
        details=["its delta would be added twice"],
        hint="a stack stands for the patches in it: use the stack or them, not both",
    )


def unite(patches: Sequence[PatchInfo]) -> FactUnion:
    """The facts of all patches, a fact that several hold once, ids made distinct.

    Raises Refused with both patches of every contradiction.
    """
    refuse_contradictions([(info.name, info) for info in patches])
    facts: list[Mapping[str, Any]] = []
    at: dict[tuple[str, str], int] = {}
    holders: dict[int, list[int]] = {}
    places: list[tuple[int, ...]] = []
    for number, info in enumerate(patches):
        mine = []
        for fact in info.manifest.facts:
            index = at.setdefault(place(fact), len(facts))
            if index == len(facts):
                facts.append(fact)
            if number not in holders.setdefault(index, []):
                holders[index].append(number)
            mine.append(index)
        places.append(tuple(mine))
    repeated = tuple(
        Repeated(text_of(facts[index]), str(facts[index]["target"]), tuple(numbers))
        for index, numbers in holders.items()
        if len(numbers) > 1
    )
    return FactUnion(_distinct_ids(facts), tuple(places), repeated)


def _distinct_ids(facts: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The facts with ids that two share numbered."""
    taken = {str(fact["id"]) for fact in facts if fact.get("id")}
    seen: set[str] = set()
    result = []
    for fact in facts:
        given = str(fact["id"]) if fact.get("id") else ""
        name, number = given, 1
        while given and name in (seen if number == 1 else taken | seen):
            number += 1
            name = f"{given}-{number}"
        seen.add(name)
        result.append({**fact, "id": name} if name != given else fact)
    return tuple(result)


def common_base(patches: Sequence[PatchInfo], report: Reporter = SILENT) -> Base:
    """The base that all patches were made for, with every weight that one of them changes.

    Weights that several change must be the same by SHA-256, or by sketch where one patch was made for a copy in
    another dtype (which a note reports). A patch that shares no weight with those before it must name the same model.
    Raises Refused with the two patches that do not go together.
    """
    weights: dict[str, tuple[BaseWeight, PatchInfo]] = {}
    cast = tokenizer = None
    for number, info in enumerate(patches):
        base = info.manifest.base
        shared = sorted(weights.keys() & base.weights.keys())
        for name in shared:
            cast = _compare(name, weights[name], (base.weights[name], info)) or cast
        if number and not shared:
            _same_name(patches[0], info)
        if base.tokenizer is not None:
            tokenizer = tokenizer or base.tokenizer
            if tokenizer != base.tokenizer:
                report.warn(f"{called(info)} was made with another tokenizer than the patches before it")
        for name, weight in base.weights.items():
            known = weights.setdefault(name, (weight, info))[0]
            if known.transposed is None and weight.transposed is not None:  # older patches do not say
                weights[name] = (replace(known, transposed=weight.transposed), weights[name][1])
    if cast:
        report.note(cast)
    first = patches[0].manifest.base
    return Base(
        first.name,
        first.family,
        {name: weights[name][0] for name in sorted(weights)},
        first.revision,
        tokenizer,
        first.extra,
    )


def _compare(name: str, first: tuple[BaseWeight, PatchInfo], second: tuple[BaseWeight, PatchInfo]) -> str | None:
    (a, info), (b, other) = first, second
    shown = printable(name, 120)
    if a.shape != b.shape:
        shapes = f"{shown} has shape {list(a.shape)} for one and {list(b.shape)} for the other"
        raise _different(info, other, [shapes])
    if (a.dtype, a.sha256) == (b.dtype, b.sha256):
        return None
    from kpatch.patch.fingerprint import same_sketch

    if a.dtype != b.dtype and same_sketch(a.sketch, a.dtype, b.sketch, b.dtype):
        return f"{called(other)} was made for the same weights as {called(info)}, stored as {b.dtype} not {a.dtype}"
    raise _different(info, other, [f"{shown}: sha256 {a.sha256[:12]}… for one and {b.sha256[:12]}… for the other"])


def _same_name(info: PatchInfo, other: PatchInfo) -> None:
    a, b = info.manifest.base, other.manifest.base
    tokens = {base.tokenizer for base in (a, b)} - {None}
    if (a.name, a.revision, a.family) != (b.name, b.revision, b.family) or len(tokens) > 1:
        names = " and ".join(f"{base.name}{f' at {base.revision}' if base.revision else ''}" for base in (a, b))
        raise _different(info, other, ["they change no weight in common that could show otherwise", f"bases {names}"])


def _different(info: PatchInfo, other: PatchInfo, details: list[str]) -> KpatchError:
    return Refused(
        f"{called(info)} and {called(other)} were made for different models",
        details=[printable(line, 300) for line in details],
        hint="`kpatch show` names a patch's base; patches go together when made for the same weights",
    )


def outer_parents(infos: Sequence[PatchInfo]) -> tuple[str, ...]:
    """Ids of the patches that these were made on top of and that are not among them."""
    inside = {part for info in infos for part in (info.id, *info.manifest.holds(info.id))}
    return tuple(sorted({parent for info in infos for parent in info.manifest.parents} - inside))


def parts_of(infos: Sequence[PatchInfo], scales: Sequence[float]) -> tuple[Mapping[str, Any], ...]:
    """What the manifest says of the patches in a stack; those of a stack among them come instead of it."""
    parts: list[Mapping[str, Any]] = []
    for info, scale in zip(infos, scales, strict=True):
        manifest = info.manifest
        own = {
            "id": info.id,
            "facts": len(manifest.facts),
            "method": manifest.method,
            "hyperparameters": manifest.hyperparameters,
            "layers": list(manifest.layers),
            "covariance": manifest.covariance,
        }
        parts += [{**part, "scale": scale * float(part["scale"])} for part in manifest.stack]
        if not manifest.stack:
            parts.append({**own, "scale": scale})
    return tuple(parts)


def protected_by(infos: Sequence[PatchInfo | Patch]) -> tuple[Mapping[str, Any], ...]:
    """The subjects that any of the patches holds, each once."""
    found: list[Mapping[str, Any]] = []
    for info in infos:
        found += [one for one in info.manifest.protect if one not in found]
    return tuple(found)


def gather(
    infos: Sequence[PatchInfo], union: FactUnion, report: Reporter = SILENT
) -> tuple[tuple[Mapping[str, Any], ...], Tensor | None, dict[int, Tensor]]:
    """Groups, values [n, d] and keys by layer [n, f] of all patches, one after the other.

    Patches without stored values or keys contribute no rows; a note names them.
    """
    import torch

    from kpatch.patch.format import read_tensor

    groups: list[Mapping[str, Any]] = []
    values: list[Tensor] = []
    keys: dict[int, list[Tensor]] = {}
    for info, places in zip(infos, union.places, strict=True):
        own = rows_of(info)
        if not own:
            if places:
                report.note(f"{called(info)} stores no values or keys, so its facts cannot be solved again")
            continue
        groups += [{**group, "facts": sorted({places[index] for index in group["facts"]})} for group in own]
        values.append(read_tensor(info, VALUES))
        for layer in sorted({layer for group in own for layer in group["layers"]}):
            keys.setdefault(layer, []).append(read_tensor(info, f"{KEYS}{layer}"))
    stored = {layer: torch.cat(several) for layer, several in sorted(keys.items())}
    return tuple(groups), torch.cat(values) if values else None, stored


def rows_of(info: PatchInfo | Patch) -> tuple[Mapping[str, Any], ...]:
    """The groups that a patch's stored rows stand for, one for each fact where it names none; none without rows."""
    manifest = info.manifest
    layers = [layer for layer in manifest.layers if f"{KEYS}{layer}" in manifest.tensors]
    groups = manifest.groups or tuple({"facts": [index], "layers": layers} for index in range(len(manifest.facts)))
    wanted = {layer for group in groups for layer in group["layers"]}
    whole = VALUES in manifest.tensors and bool(layers) and wanted <= set(layers)
    return groups if whole else ()
