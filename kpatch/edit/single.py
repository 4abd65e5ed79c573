"""Patches of methods that edit one layer: from facts to a file with its effect measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpatch.checkpoint.fit import base_weights
from kpatch.edit.ft import stored_small, tune
from kpatch.edit.memit import add, restored
from kpatch.edit.one_layer import FtHyper, OneLayer, RomeHyper
from kpatch.edit.rome import edit_all, preserved_by, rome_contexts, together
from kpatch.evaluate.metrics import effect, measure
from kpatch.facts.fact import Fact
from kpatch.models.model import Model, tokenizer_hash
from kpatch.patch.build import build_manifest
from kpatch.patch.delta import Delta, smaller
from kpatch.patch.format import pack, write_patch
from kpatch.reporter import SILENT, Reporter


@dataclass
class Settings:
    """What a method needs besides facts, model and hyperparameters; `clock` collects the seconds of its steps."""

    corpus: str = "self"
    tokens: int | None = None
    seed: int = 0
    clock: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.clock[name] = time.monotonic() - start


@dataclass(frozen=True)
class Found:
    """A method's change of its layer; the covariance, keys [n, f] and values [n, d] of one that has them."""

    delta: Delta
    covariance: Mapping[str, Any] | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


def find(model: Model, facts: Sequence[Fact], hyper: OneLayer, settings: Settings, report: Reporter = SILENT) -> Found:
    """The change that a method finds for all facts; the model is left as it was found."""
    if isinstance(hyper, RomeHyper):
        return _rome(model, facts, hyper, settings, report)
    assert isinstance(hyper, FtHyper)
    with settings.timed("update"):
        return Found(stored_small(tune(model, facts, hyper, report)[0]))


def _rome(model: Model, facts: Sequence[Fact], hyper: RomeHyper, settings: Settings, report: Reporter) -> Found:
    with settings.timed("covariance"):
        preserved, covariance = preserved_by(model, hyper, settings.corpus, settings.tokens, settings.seed, report)
    with report.task("Sampling contexts"):
        contexts = rome_contexts(model, hyper, settings.seed)
    with settings.timed("values"):
        edits = edit_all(model, facts, hyper, contexts, preserved, report)
    keys, values = torch.stack([edit.key for edit in edits]), torch.stack([edit.value for edit in edits])
    return Found(smaller(together(model, edits)), covariance.to_dict(), keys, values)


def make_single(
    method: str,
    model: Model,
    facts: Sequence[Fact],
    out: str | Path,
    hyper: OneLayer,
    settings: Settings,
    parents: tuple[str, ...] = (),
    force: bool = False,
    report: Reporter = SILENT,
) -> tuple[str, dict[str, Any]]:
    """Edit one layer, measure before and after, write the patch; its id and effect."""
    assert model.path is not None
    name = model.weight_name(hyper.layer)
    base = base_weights(model.path, [name], report)
    before = measure(model, facts, report=report)
    found = find(model, facts, hyper, settings, report)
    with restored(model, [hyper.layer]):
        add(model, hyper.layer, found.delta)
        after = measure(model, facts, report=report)
    measured = effect(before, after)
    dtype = str(model.dtype).removeprefix("torch.")
    manifest = build_manifest(
        base_name=model.name,
        family=model.family.model_type,
        revision=model.revision,
        tokenizer=tokenizer_hash(model.tokenizer),
        weights=base,
        transposed=model.stores_transposed,
        deltas={name: found.delta},
        method=method,
        layers=(hyper.layer,),
        facts=tuple(fact.in_manifest() for fact in facts),
        hyperparameters={**hyper.to_dict(), "seed": settings.seed, "dtype": dtype},
        covariance=found.covariance,
        parents=parents,
        effect=measured,
    )
    keys = None if found.keys is None else {hyper.layer: found.keys}
    return write_patch(out, manifest, pack({name: found.delta}, found.values, keys), force), measured
