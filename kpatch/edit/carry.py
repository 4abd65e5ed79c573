"""The updates of all parts, one after the other, with the model as the patch makes it while they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.edit.first_token import Part, preserve
from kpatch.edit.hyper import Hyper
from kpatch.edit.memit import add, restored, spread
from kpatch.facts.fact import Fact
from kpatch.models.model import Model, tokenizer_hash
from kpatch.patch.build import build_manifest
from kpatch.patch.delta import Dense, LowRank, total
from kpatch.patch.format import pack, write_patch
from kpatch.patch.manifest import BaseWeight
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.covariance import Covariance


@dataclass
class Carried:
    """What the parts' updates came to: deltas by weight, keys [n, f] by layer, values z [n, d], what each row is."""

    deltas: dict[str, LowRank | Dense]
    keys: dict[int, Tensor]
    values: Tensor
    groups: tuple[Mapping[str, Any], ...]


@contextmanager
def carried(
    model: Model,
    parts: Sequence[Part],
    z: Sequence[Tensor],
    covariance: Covariance,
    earlier: dict[int, Tensor],
    *,
    budget: int,
    report: Reporter = SILENT,
) -> Iterator[Carried]:
    """Compute the updates that carry each part's values z [n, d]; the model holds them inside the `with` only.

    `earlier` are keys [f, p] by layer that must go on meaning what they do, `budget` bytes for activations.
    """
    deltas: dict[str, list[LowRank | Dense]] = {}
    keys: dict[int, list[Tensor]] = {}
    with restored(model, touched(parts)):
        for part, values in zip(parts, z, strict=True):
            preserved = preserve(model, part, covariance, earlier, report) if distributed.is_main() else {}
            update = spread(
                model,
                part.groups,
                values,
                preserved,
                part.hyper,
                budget=budget // 2,
                least_leverage=part.least_leverage,
                report=report,
            )
            for layer in part.hyper.layers:
                delta = update.deltas[model.weight_name(layer)]
                deltas.setdefault(model.weight_name(layer), []).append(delta)
                keys.setdefault(layer, []).append(update.keys[layer])
                add(model, layer, delta)
        yield Carried(
            {name: total(several) for name, several in sorted(deltas.items())},
            {layer: torch.cat(several) for layer, several in keys.items()},
            torch.cat(list(z)),
            tuple(about for part in parts for about in part.about()),
        )


def touched(parts: Sequence[Part]) -> list[int]:
    """Every layer that a part edits, rising."""
    return sorted({layer for part in parts for layer in part.hyper.layers})


@dataclass(frozen=True)
class Origin:
    """What a patch says of how it came about, besides the deltas."""

    method: str
    facts: Sequence[Fact]
    hyper: Hyper
    seed: int
    covariance: Covariance
    base: Mapping[str, BaseWeight]
    effect: dict[str, Any]
    parents: tuple[str, ...] = ()
    stack: tuple[Mapping[str, Any], ...] = field(default=())


def save(out: str | Path, model: Model, found: Carried, origin: Origin, force: bool) -> str:
    """Write the patch and give its id. Raises Refused where `out` exists, BadInput where it cannot be written."""
    manifest = build_manifest(
        base_name=model.name,
        family=model.family.model_type,
        revision=model.revision,
        tokenizer=tokenizer_hash(model.tokenizer),
        weights=origin.base,
        transposed=model.stores_transposed,
        deltas=found.deltas,
        method=origin.method,
        layers=tuple(found.keys),
        facts=tuple(fact.in_manifest() for fact in origin.facts),
        hyperparameters={
            **origin.hyper.to_dict(),
            "seed": origin.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        covariance=origin.covariance.to_dict(),
        parents=origin.parents,
        effect=origin.effect,
        groups=found.groups,
        stack=origin.stack,
    )
    return write_patch(out, manifest, pack(found.deltas, found.values, found.keys), force)
