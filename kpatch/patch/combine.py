"""The facts of several patches as one list: none may contradict another, and each is kept once. No torch.

Were several patches made for the same model? Weight by weight, by what their manifests say. No weights are read.

What several patches store, put together: which patches they are, and the rows for solving their facts again.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kpatch.errors import KpatchError, Refused
from kpatch.patch.fingerprint import same_sketch
from kpatch.patch.format import read_tensor
from kpatch.patch.header import KEYS, VALUES, PatchInfo
from kpatch.patch.manifest import Base, BaseWeight
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

_SHOWN = 10


@dataclass(frozen=True)
class Repeated:
    """A fact that several patches hold: its text, its target, and their positions among the patches."""

    text: str
    target: str
    patches: tuple[int, ...]


@dataclass(frozen=True)
class Union:
    """All facts of some patches, each once; `places[i][j]` is the position in `facts` of fact j of patch i."""

    facts: tuple[Mapping[str, Any], ...]
    places: tuple[tuple[int, ...], ...]
    repeated: tuple[Repeated, ...]


def normal(text: object) -> str:
    """Text for comparing: one space between words, accents composed."""
    return " ".join(unicodedata.normalize("NFC", str(text)).split())


def place(fact: Mapping[str, Any]) -> tuple[str, str]:
    """What a fact is about: its subject and its prompt, for comparing."""
    return normal(fact["subject"]), normal(fact["prompt"])


def text_of(fact: Mapping[str, Any]) -> str:
    """The prompt with the subject in place."""
    return str(fact["prompt"]).replace("{}", str(fact["subject"]))


def called(info: PatchInfo) -> str:
    """A patch by its file's name and the beginning of its id."""
    return f"{info.name} ({info.id[:12]})"


def unite(patches: Sequence[PatchInfo]) -> Union:
    """The facts of all patches, a fact that several hold once, ids made distinct.

    Raises Refused with both patches of every contradiction: the same subject and the same prompt or relation with
    different targets (MEMIT, Eqn. 5: one key cannot carry two values).
    """
    conflicts = _conflicts(patches)
    if conflicts:
        more = [f"… and {len(conflicts) - _SHOWN} more"] if len(conflicts) > _SHOWN else []
        names = " and ".join(called(patches[index]) for index in conflicts[0][1])
        raise Refused(
            f"{names} contradict each other",
            details=[line for line, _ in conflicts[:_SHOWN]] + more,
            hint="take those facts out of one of the fact files and make that patch again",
        )
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
    return Union(_distinct_ids(facts), tuple(places), repeated)


def _conflicts(patches: Sequence[PatchInfo]) -> list[tuple[str, tuple[int, int]]]:
    """A line for every contradiction between two patches, and the two."""
    said: dict[tuple[str, str, str], tuple[str, int]] = {}
    found = []
    for number, info in enumerate(patches):
        for fact in info.manifest.facts:
            for key in ("prompt", "relation"):
                if not isinstance(fact.get(key), str) or not fact[key]:
                    continue
                target = str(fact["target"])
                earlier, other = said.setdefault((normal(fact["subject"]), key, normal(fact[key])), (target, number))
                if normal(earlier) != normal(target) and other != number:
                    found.append((_line(fact, key, (earlier, patches[other]), (target, info)), (other, number)))
                    break  # the prompt says it already
    return found


def _line(fact: Mapping[str, Any], key: str, first: tuple[str, PatchInfo], second: tuple[str, PatchInfo]) -> str:
    about = text_of(fact) if key == "prompt" else f"{fact[key]} of {fact['subject']}"
    says = " but ".join(f"{printable(target, 80)!r} in {called(info)}" for target, info in (first, second))
    return f"{printable(about, 120)}: {says}"


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
    another dtype (which is said). A patch that shares no weight with those before it must name the same model.
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
            weights.setdefault(name, (weight, info))
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


def refuse_twice(infos: Sequence[PatchInfo]) -> None:
    """Raise Refused for a patch that is given twice, itself or inside a stack: its delta would count twice."""
    held: dict[str, PatchInfo] = {}
    for info in infos:
        for part in sorted(info.manifest.holds(info.id)):
            if part in held:
                other = held[part]
                raise Refused(
                    f"{info.path} is given twice"
                    if other.id == info.id
                    else f"{called(other)} and {called(info)} both hold patch {part[:12]}",
                    details=["its delta would be added twice"],
                    hint="a stack stands for the patches in it: give it or them",
                )
            held[part] = info


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


def gather(
    infos: Sequence[PatchInfo], union: Union, report: Reporter = SILENT
) -> tuple[tuple[Mapping[str, Any], ...], Tensor | None, dict[int, Tensor]]:
    """Groups, values [n, d] and keys by layer [n, f] of all patches, one after the other.

    Patches that store no values, or no keys, have no rows in them, which is said.
    """
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


def rows_of(info: PatchInfo) -> tuple[Mapping[str, Any], ...]:
    """The groups that a patch's stored rows stand for, one for each fact where it names none; none without rows."""
    manifest = info.manifest
    layers = [layer for layer in manifest.layers if f"{KEYS}{layer}" in manifest.tensors]
    groups = manifest.groups or tuple({"facts": [index], "layers": layers} for index in range(len(manifest.facts)))
    wanted = {layer for group in groups for layer in group["layers"]}
    whole = VALUES in manifest.tensors and bool(layers) and wanted <= set(layers)
    return groups if whole else ()
