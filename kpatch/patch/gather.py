"""What several patches store, put together: which patches they are, and the rows for solving their facts again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kpatch.errors import Refused
from kpatch.patch.format import read_tensor
from kpatch.patch.header import KEYS, VALUES, PatchInfo
from kpatch.patch.text import printable
from kpatch.patch.union import Union, called
from kpatch.reporter import SILENT, Reporter


def refuse_twice(infos: Sequence[PatchInfo]) -> None:
    """Raise Refused for a patch that is given twice, itself or inside a stack: its delta would count twice."""
    held: dict[str, PatchInfo] = {}
    for info in infos:
        for part in sorted(info.manifest.holds(info.id)):
            if part in held:
                other = held[part]
                raise Refused(
                    f"{printable(str(info.path))} is given twice"
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
