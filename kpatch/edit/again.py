"""`stack --resolve`: the facts of several patches solved jointly, from the values that the patches store.

A sum of deltas is not what MEMIT would have found for all facts at once: each was made as if the others' keys were
text. Here the update of MEMIT runs once more over all facts (Meng et al. 2023, algorithm 1). Its values z are those
in the patches, so the slow step is left out; keys and residuals are collected on the unpatched model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kpatch.checkpoint.index import open_checkpoint
from kpatch.checkpoint.store import Store
from kpatch.checkpoint.verify import base_weights, verify_fit
from kpatch.edit.alike import settings_of
from kpatch.edit.batches import DEFAULT_BUDGET
from kpatch.edit.carry import Origin, carried, save, touched
from kpatch.edit.contexts import contexts_for
from kpatch.edit.find import find_values
from kpatch.edit.groups import group_facts
from kpatch.edit.parts import Part, split
from kpatch.edit.pipeline import MakeResult, peak_memory
from kpatch.errors import BadInput, Refused
from kpatch.evaluate.metrics import effect, measure
from kpatch.facts.prompts import check_lengths
from kpatch.facts.schema import Fact
from kpatch.models.address import resolve
from kpatch.models.aliases import ALIASES, Package
from kpatch.models.load import Model, load_model
from kpatch.patch.bases import common_base
from kpatch.patch.format import read_tensor
from kpatch.patch.gather import parts_of, refuse_twice, rows_of
from kpatch.patch.header import VALUES, PatchInfo, read_header
from kpatch.patch.manifest import Base
from kpatch.patch.text import printable
from kpatch.patch.union import Union, unite
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.collect import collect

Rows = dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor]


def solve_again(
    patches: Sequence[str | Path],
    out: str | Path,
    *,
    model: str | Model | None = None,
    corpus: str | None = None,
    device: str = "auto",
    memory: int | None = None,
    modules: dict[str, str] | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> tuple[MakeResult, tuple[PatchInfo, ...], Union]:
    """Solve the facts of all patches jointly, measure the effect and write the patch; gives the patches and facts too.

    `model` is where the base is (default: what the patches call it), `corpus` the text for the covariance (default:
    that of the patches), `memory` bytes for activations. Subjects that several patches edit get a new value.
    Raises Refused for patches that contradict, are for other weights, store no values, need a patch that is not among
    them, or were made with other settings; BadInput where the model or the corpus cannot be had.
    """
    started = time.monotonic()
    infos = tuple(read_header(path) for path in patches)
    if not infos:
        raise BadInput("No patch given")
    refuse_twice(infos)
    union = unite(infos)
    base = common_base(infos, report)
    settings = settings_of(infos, corpus)
    edited = _base_model(infos, base, model, device, settings.dtype, modules, report)
    assert edited.path is not None
    facts = tuple(Fact.from_dict(dict(fact)) for fact in union.facts)
    check_lengths(edited.tokenizer, facts)
    hyper = settings.hyper
    contexts = contexts_for(edited, hyper.lead_ins, hyper.prefixes, hyper.prefix_tokens, settings.seed)
    parts = split(group_facts(edited, facts, contexts), settings.hyper)
    layers = touched(parts)
    clock = {}
    budget = DEFAULT_BUDGET if memory is None else memory
    before = measure(edited, facts, report=report)
    begun = time.monotonic()
    covariance = collect(
        edited, layers, corpus=settings.corpus, tokens=settings.tokens, seed=settings.seed, report=report
    )
    clock["covariance"] = time.monotonic() - begun
    begun = time.monotonic()
    stored = _stored(infos, union)
    z = [_values(edited, part, stored, facts, budget, report) for part in parts]
    clock["values"] = time.monotonic() - begun
    begun = time.monotonic()
    with carried(edited, parts, z, covariance, {}, budget=budget, report=report) as found:
        clock["update"] = time.monotonic() - begun
        after = measure(edited, facts, report=report)
    measured = effect(before, after)
    weights = base_weights(edited.path, [edited.weight_name(layer) for layer in layers], report)
    made_of = parts_of(infos, (1.0,) * len(infos))
    origin = Origin("memit", facts, settings.hyper, settings.seed, covariance, weights, measured, (), made_of)
    identity = save(out, edited, found, origin, force)
    clock["total"] = time.monotonic() - started
    size, name = Path(out).stat().st_size, edited.name
    peak = peak_memory(edited)
    return MakeResult(identity, Path(out), size, name, "memit", tuple(layers), measured, clock, peak), infos, union


def _base_model(
    infos: Sequence[PatchInfo],
    base: Base,
    model: str | Model | None,
    device: str,
    dtype: str,
    modules: dict[str, str] | None,
    report: Reporter,
) -> Model:
    """The unpatched model in memory. Raises Refused where its weights are not those the patches were made for."""
    if isinstance(model, Model):
        if model.path is None:
            raise BadInput(f"{model.name} was not loaded from a checkpoint directory", hint="give the model's address")
        _check_base(infos, model.path, report)
        return model
    resolved = resolve(model or _address(base), report)
    report.note(resolved.said)
    _check_base(infos, resolved.path, report)
    with report.task(f"Loading {resolved.name}"):
        return load_model(resolved, device=device, dtype=dtype, modules=modules)


def _check_base(infos: Sequence[PatchInfo], path: Path, report: Reporter) -> None:
    for info in infos:
        fit = verify_fit(info.path, path, report)
        if not fit.ok:
            raise fit.error(Refused)
    if Store(open_checkpoint(path).path).applied().patches:
        raise Refused(
            f"{printable(str(path))} carries patches; the facts are solved from the unpatched model",
            hint="take them off with `kpatch revert --all`, or name the model it was copied from",
        )


def _address(base: Base) -> str:
    """Where the base is likely to be found by its name. Raises BadInput."""
    for name, alias in ALIASES.items():
        if isinstance(alias.source, Package) and alias.source.title == base.name:
            return name
    if "/" in base.name:
        return f"{base.name}@{base.revision}" if base.revision else base.name
    raise BadInput(
        f"Where is {printable(base.name, 120)}, the model these patches were made for?",
        hint="name it: --model, with an alias, a hub id, a checkpoint directory or a GGUF file",
    )


def _stored(infos: Sequence[PatchInfo], union: Union) -> Rows:
    """The patches' values by the facts (positions in the union) and the layers they are for; the first one counts."""
    rows: Rows = {}
    for info, places in zip(infos, union.places, strict=True):
        values = read_tensor(info, VALUES)
        for row, group in enumerate(rows_of(info)):
            about = tuple(sorted({places[index] for index in group["facts"]}))
            rows.setdefault((about, tuple(group["layers"])), values[row])
    return rows


def _values(model: Model, part: Part, stored: Rows, facts: Sequence[Fact], budget: int, report: Reporter) -> Tensor:
    """z [n, d] for the groups of a part: stored ones, and new ones for subjects that several patches edit."""
    z: list[Tensor | None] = [stored.get((tuple(sorted(g.facts)), part.hyper.layers)) for g in part.groups]
    missing = [index for index, row in enumerate(z) if row is None]
    if missing:
        subjects = ", ".join(printable(part.groups[index].subject, 40) for index in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        report.note(f"finding a value anew for {subjects}{more}: several patches edit the subject")
        groups = [part.groups[index] for index in missing]
        for index, row in zip(
            missing, find_values(model, groups, part.hyper, budget=budget, report=report).z, strict=True
        ):
            z[index] = row
    return torch.stack([row for row in z if row is not None]).float()
