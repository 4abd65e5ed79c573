"""`make`: from a fact file to a patch on disk with its effect measured. Each step is somebody else's module."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.checkpoint.fit import base_weights
from kpatch.checkpoint.shards import open_checkpoint
from kpatch.checkpoint.store import Store
from kpatch.edit.carry import Origin, carried, save, touched
from kpatch.edit.first_token import split
from kpatch.edit.hyper import hyper_for
from kpatch.edit.one_layer import PRESETS, one_layer_hyper
from kpatch.edit.requests import contexts_for, group_facts
from kpatch.edit.single import Settings, make_single
from kpatch.edit.values_cache import DEFAULT_BUDGET, find_values
from kpatch.errors import BadInput
from kpatch.evaluate.metrics import effect, measure
from kpatch.facts.fact import Fact, FactFile
from kpatch.facts.tokens import check_lengths
from kpatch.models.address import resolve
from kpatch.models.model import Model, load_model
from kpatch.outputs import check_new_file
from kpatch.patch.format import read_patch
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.covariance import collect
from kpatch.trace.files import read_layers

METHODS = ("memit", *PRESETS)


@dataclass(frozen=True)
class MakeResult:
    """What `make` has to tell: the patch, its effect, and what it cost (seconds, bytes)."""

    patch_id: str
    path: Path
    bytes: int
    model: str
    method: str
    layers: tuple[int, ...]
    effect: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None

    @property
    def facts(self) -> list[dict[str, Any]]:
        """One row per fact: text, target, answers and probabilities before and after."""
        return list(self.effect["facts"])


def make(
    facts: FactFile | Sequence[Fact],
    *,
    out: str | Path,
    model: str | Model | None = None,
    method: str = "memit",
    layers: Sequence[int] | None = None,
    layers_from: str | Path | None = None,
    corpus: str = "self",
    tokens: int | None = None,
    settings: dict[str, str] | None = None,
    on: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    memory: int | None = None,
    modules: dict[str, str] | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> MakeResult:
    """Make a patch with MEMIT, or with another of METHODS, and write it to `out`.

    `model` is an address or a loaded Model, `on` a checkpoint directory that already carries patches, `memory` the
    bytes that activations may take, `layers_from` a trace.json that names the layers. The same inputs, seed and
    machine give the same patch, however many ranks (kpatch.distributed) share the work.
    Raises BadInput (facts, model, corpus, settings), Refused (`out` exists), Damaged (`on` was modified).
    """
    started = time.monotonic()
    clock: dict[str, float] = {"covariance": 0.0, "values": 0.0, "update": 0.0}
    chosen = tuple(facts.facts if isinstance(facts, FactFile) else facts)
    if not chosen:
        raise BadInput("There are no facts to make a patch from")
    check_new_file(out, force=force, what="a patch")  # before an hour of work, not after it
    if method not in METHODS:
        raise BadInput(f"Unknown method {method!r}", details=[f"expected one of {', '.join(METHODS)}"])
    edited = _load(facts, model, on, device, dtype, modules, report)
    path = edited.path
    if path is None:
        raise BadInput(
            f"{edited.name} was not loaded from a checkpoint directory, so a patch cannot name its base",
            hint="give the model's address instead",
        )
    if layers_from is not None:
        if layers is not None:
            raise BadInput("--layers and --layers-from exclude each other", hint="leave one of them out")
        layers = read_layers(layers_from, edited)
    check_lengths(edited.tokenizer, chosen)
    if method in PRESETS:
        one = one_layer_hyper(method, edited, layers, settings or {}, report)
        parents = _earlier(path, ())[0] if on is not None else ()
        about = Settings(corpus, tokens, seed, clock)

        def single() -> tuple[str, dict[str, Any], int]:
            made = make_single(method, edited, chosen, out, one, about, parents, force, report)
            return *made, Path(out).stat().st_size

        identity, measured, size = distributed.main_does(single)  # facts one after another: nothing to share
        clock["total"] = time.monotonic() - started
        peak = peak_memory(edited)
        return MakeResult(identity, Path(out), size, edited.name, method, (one.layer,), measured, clock, peak)
    hyper = hyper_for(edited, layers, settings or {}, report)
    with report.task("Sampling contexts"):
        contexts = distributed.main_does(
            lambda: contexts_for(edited, hyper.lead_ins, hyper.prefixes, hyper.prefix_tokens, seed)
        )
    parts = split(group_facts(edited, chosen, contexts), hyper)
    layers = touched(parts)
    names = [edited.weight_name(layer) for layer in layers]
    base = distributed.main_does(lambda: base_weights(path, names, report))
    parents, earlier = _earlier(path, layers) if on is not None else ((), {})
    before = measure(edited, chosen, report=report)

    with _timed(clock, "covariance"):
        covariance = collect(edited, layers, corpus=corpus, tokens=tokens, seed=seed, report=report)
    budget = DEFAULT_BUDGET if memory is None else memory
    with _timed(clock, "values"):
        z = [
            find_values(edited, part.groups, part.hyper, budget=budget, resume=resume, report=report).z
            for part in parts
        ]
    begun = time.monotonic()
    with carried(edited, parts, z, covariance, earlier, budget=budget, report=report) as found:
        clock["update"] = time.monotonic() - begun
        after = measure(edited, chosen, report=report)
    measured = effect(before, after)
    origin = Origin(method, chosen, hyper, seed, covariance, base, measured, parents)
    identity, size = distributed.main_does(lambda: (save(out, edited, found, origin, force), Path(out).stat().st_size))
    clock["total"] = time.monotonic() - started
    return MakeResult(
        identity, Path(out), size, edited.name, method, tuple(layers), measured, clock, peak_memory(edited)
    )


def _load(
    facts: FactFile | Sequence[Fact],
    model: str | Model | None,
    on: str | Path | None,
    device: str,
    dtype: str,
    modules: dict[str, str] | None,
    report: Reporter,
) -> Model:
    if isinstance(model, Model):
        return model
    named = facts.model if isinstance(facts, FactFile) else None
    address = str(on) if on is not None else model or named
    if address is None:
        raise BadInput(
            "No model was named", hint="give --model, or write `model: smollm2` at the head of the fact file"
        )
    resolved = resolve(address, report)
    report.note(resolved.said)
    with report.task(f"Loading {resolved.name}"):
        return load_model(resolved, device=device, dtype=dtype, modules=modules)


def _earlier(path: Path, layers: Sequence[int]) -> tuple[tuple[str, ...], dict[int, Tensor]]:
    """Ids of the patches a checkpoint carries, and their keys [f, p] by layer, which the update must preserve."""
    store = Store(open_checkpoint(path).path)
    patches = [read_patch(store.copy(identity)) for identity in sorted(store.applied().ids)]
    keys: dict[int, Tensor] = {}
    for layer in layers:
        columns = [patch.keys[layer].T for patch in patches if layer in patch.keys]
        if columns:
            keys[layer] = torch.cat(columns, dim=1)
    return tuple(patch.id for patch in patches), keys


@contextmanager
def _timed(clock: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    clock[name] = time.monotonic() - start


def peak_memory(model: Model) -> int:
    """The most memory this process has held, in bytes: resident memory, plus the device's where there is one."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if model.device.type == "cuda":
        peak += torch.cuda.max_memory_allocated(model.device)
    return peak
