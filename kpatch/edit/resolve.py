"""`stack --resolve`: the facts of several patches solved jointly, from the values that the patches store.

A sum of deltas is not what MEMIT would have found for all facts at once: each was made as if the others' keys were
text. Here the update of MEMIT runs once more over all facts (Meng et al. 2023, algorithm 1). Its values z are those
in the patches, so the slow step is left out; keys and residuals are collected on the unpatched model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from kpatch.checkpoint.fit import verify_fit
from kpatch.checkpoint.shards import open_checkpoint
from kpatch.checkpoint.store import Store
from kpatch.edit.make import MakeResult, write_edit
from kpatch.edit.methods import DEFAULT_BUDGET, Inputs, Method, method_named
from kpatch.edit.presets import HyperParams
from kpatch.errors import BadInput, Refused
from kpatch.facts.fact import Fact, Protected
from kpatch.facts.tokens import check_lengths
from kpatch.memory import bytes_given
from kpatch.models.address import resolve
from kpatch.models.aliases import alias_of
from kpatch.models.mixed_precision import MIXED
from kpatch.models.model import Model, load_model
from kpatch.patch.combine import (
    FactUnion,
    called,
    common_base,
    outer_parents,
    parts_of,
    protected_by,
    read_together,
    refuse_twice,
    rows_of,
    unite,
)
from kpatch.patch.format import read_tensor
from kpatch.patch.header import VALUES, PatchInfo
from kpatch.patch.manifest import Base
from kpatch.patch.sources import PatchSource, patch_list
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.corpus import SELF
from kpatch.text import printable

_METHODS = ("memit", "memit-paper")  # those whose values can be solved again


@dataclass(frozen=True)
class _Made:
    """A patch, how it was made, and R as far as its groups tell."""

    info: PatchInfo
    method: str
    hyperparameters: Mapping[str, Any]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Common:
    """How the patches were made, where that must be the same for all of them."""

    method: Method
    hyper: HyperParams
    seed: int
    dtype: str
    corpus: str
    tokens: int | None


def settings_of(infos: Sequence[PatchInfo], corpus: str | None) -> Common:
    """The settings that all patches were made with; `corpus` None is theirs.

    Raises Refused for a patch without stored values, one not made with MEMIT, one made on top of a patch that is not
    among them, and settings that differ.
    """
    parents = outer_parents(infos)
    if parents:
        raise Refused(
            f"They were made on top of patch {parents[0][:12]}, which is not among them",
            hint="give that patch too: all facts are solved from the unpatched model",
        )
    all_made: list[_Made] = []
    for info in infos:
        rows = rows_of(info)
        if not rows:
            raise Refused(f"{called(info)} stores no values and keys to solve its facts again from")
        all_made += [_Made(info, *made, _edited(rows, made[1])) for made in _made(info)]
    widest = max(all_made, key=lambda each: each.layers)
    for one in all_made:
        _same(all_made[0], one)
        _same(widest, one)
    made, method = all_made[0].hyperparameters, method_named(all_made[0].method)
    numbers: dict[str, Any] = {f.name: made[f.name] for f in fields(method.hyper) if f.name in made}
    covariance = next((info.manifest.covariance for info in infos if info.manifest.covariance), None) or {}
    return Common(
        method,
        method.hyper(layers=widest.layers or _all_edited(infos), **numbers),
        int(made["seed"]),
        MIXED if all(each.hyperparameters["dtype"] == MIXED for each in all_made) else _held_in(made),
        corpus or str(covariance.get("corpus", SELF)),
        covariance.get("tokens"),
    )


def _made(info: PatchInfo) -> list[tuple[str, Mapping[str, Any]]]:
    """Method and hyperparameters of a patch, or of those in a stack. Raises Refused where that was not MEMIT."""
    manifest = info.manifest
    found = [(manifest.method, manifest.hyperparameters)]
    if manifest.method == "stack":
        found = [(str(part["method"]), part["hyperparameters"]) for part in manifest.stack]
        changed = [part["scale"] for part in manifest.stack if part["scale"] != 1]
        if changed:
            raise Refused(f"{called(info)} holds patches at a scale ({changed[0]:g}), which values do not have")
    # Before there were two of them, the paper's method was called memit
    found = [
        ("memit-paper" if method == "memit" and "covariance_weight" in made else method, made)
        for method, made in found
    ]
    for method, made in found:
        if method not in _METHODS or not made.keys() >= {*_deciding(method), "dtype"} or not _numbers(method, made):
            raise Refused(
                f"{called(info)} was made with {printable(method, 40)}, not with MEMIT of this kpatch",
                hint="add up their deltas instead, which works for patches of any method",
            )
    return found


def _deciding(method: str) -> tuple[str, ...]:
    """What decides the update besides the values; the other settings only decide those."""
    return (*method_named(method).hyper.update, "seed")


def _held_in(made: Mapping[str, Any]) -> str:
    """The dtype of the model that a patch was made with. In which precision it multiplied decides nothing here."""
    return "float32" if made["dtype"] == MIXED else str(made["dtype"])


def _numbers(method: str, made: Mapping[str, Any]) -> bool:
    """Whether every setting that is a number in the method is one here; a patch may come from elsewhere."""
    names = [field.name for field in fields(method_named(method).hyper) if field.name != "layers"] + ["seed"]
    return all(type(made.get(name, 0)) in (int, float) for name in names)


def _edited(rows: Sequence[Mapping[str, Any]], made: Mapping[str, Any]) -> tuple[int, ...]:
    """R: the layers of the groups that are not at the layer for subjects that open a text; empty where all are."""
    inside = [tuple(group["layers"]) for group in rows if group["facts"] and not _is_first(group, made)]
    if "covariance_weight" in made:
        return max(inside, default=())
    return tuple(sorted({layer for layers in inside for layer in layers}))  # a value for each layer


def _is_first(group: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    """Whether a row is for a subject that opens a text; older patches tell by the layer alone."""
    if "covariance_weight" in made and "first" not in group:
        return tuple(group["layers"]) == (made["first_layer"],)
    return group.get("first") is True


def _all_edited(infos: Sequence[PatchInfo]) -> tuple[int, ...]:
    return tuple(sorted({layer for info in infos for layer in info.manifest.layers}))


def _same(first: _Made, second: _Made) -> None:
    """Raise Refused where two patches were not made in one way, with what differs."""
    wrong = [f"method: {first.method} and {second.method}"] if first.method != second.method else []
    made, others = first.hyperparameters, second.hyperparameters
    if not wrong:
        wrong = [
            f"{key}: {made[key]} and {others[key]}" for key in _deciding(first.method) if made[key] != others[key]
        ]
        if _held_in(made) != _held_in(others):
            wrong.append(f"dtype: {_held_in(made)} and {_held_in(others)}")
    if first.layers and second.layers and first.layers != second.layers:
        wrong.append(f"layers: {list(first.layers)} and {list(second.layers)}")
    if wrong:
        raise Refused(
            f"{called(first.info)} and {called(second.info)} were made with other settings",
            details=[printable(line, 200) for line in wrong],
            hint="add up their deltas instead, or make one of them again",
        )


Rows = dict[tuple[tuple[int, ...], tuple[int, ...], bool], Tensor]


@dataclass(frozen=True)
class ResolveResult:
    """The outcome of `solve_again`: the patch that was made, and the patches and the facts that went into it."""

    made: MakeResult
    patches: tuple[PatchInfo, ...]
    union: FactUnion


def solve_again(
    patches: PatchSource | Sequence[PatchSource],
    out: str | Path,
    *,
    model: str | Model | None = None,
    corpus: str | None = None,
    device: str = "auto",
    memory: int | None = None,
    modules: dict[str, str] | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> ResolveResult:
    """Solve the facts of all patches jointly, measure the effect and write the patch.

    `model` is where the base is (default: what the patches call it), `corpus` the text for the covariance (default:
    that of the patches), `memory` bytes for activations. Subjects that several patches edit get a new value.
    Raises Refused for patches that contradict, are for other weights, store no values, need a patch that is not among
    them, or were made with other settings; BadInput where the model or the corpus cannot be had.
    """
    started = time.monotonic()
    infos = read_together(patch_list(patches))
    if not infos:
        raise BadInput("No patch given")
    budget = bytes_given(memory, DEFAULT_BUDGET, "memory")
    refuse_twice([(info.name, info) for info in infos])
    union = unite(infos)
    base = common_base(infos, report)
    settings = settings_of(infos, corpus)
    edited = _base_model(infos, base, model, device, settings.dtype, modules, report)
    assert edited.path is not None
    facts = tuple(Fact.from_dict(dict(fact)) for fact in union.facts)
    check_lengths(edited.tokenizer, facts)
    inputs = Inputs(
        corpus=settings.corpus,
        tokens=settings.tokens,
        seed=settings.seed,
        budget=budget,
        stored=_stored(infos, union),
        protect=tuple(Protected.from_dict(one) for one in protected_by(infos)),
        report=report,
    )
    made = write_edit(
        edited,
        facts,
        settings.method,
        settings.hyper,
        inputs,
        out=out,
        stack=parts_of(infos, (1.0,) * len(infos)),
        force=force,
        started=started,
    )
    return ResolveResult(made, infos, union)


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
            f"{path} carries patches; the facts are solved from the unpatched model",
            hint="take them off with `kpatch revert --all`, or name the model it was copied from",
        )


def _address(base: Base) -> str:
    """Where the base is likely to be found by its name. Raises BadInput."""
    alias = alias_of(base.name)
    if alias is not None:
        return alias
    if "/" in base.name:
        return f"{base.name}@{base.revision}" if base.revision else base.name
    raise BadInput(
        f"Where is {printable(base.name, 120)}, the model these patches were made for?",
        hint="name it with `model`: an alias, a hub id, a checkpoint directory or a GGUF file",
    )


def _stored(infos: Sequence[PatchInfo], union: FactUnion) -> Rows:
    """Values by facts (positions in the union), layers, and whether the subjects open a text; the first one counts."""
    rows: Rows = {}
    for info, places in zip(infos, union.places, strict=True):
        values, (_, made) = read_tensor(info, VALUES), _made(info)[0]
        for row, group in enumerate(rows_of(info)):
            if not group["facts"]:  # a parent's fact: its value is the parent's
                continue
            about = tuple(sorted({places[index] for index in group["facts"]}))
            rows.setdefault((about, tuple(group["layers"]), _is_first(group, made)), values[row])
    return rows
