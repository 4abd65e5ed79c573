"""The recipe of a patch: load, hash the base, measure, let the method edit, measure again, write.

`make` starts from facts. `kpatch.edit.resolve` starts from patches that are stacked. Both end in `write_edit`.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kpatch import arguments, distributed
from kpatch.checkpoint.fit import base_weights
from kpatch.edit.asked_wordings import ask_for_wordings
from kpatch.edit.earlier import carried_by, facts_that_stay, protected
from kpatch.edit.methods import DEFAULT_BUDGET, Edit, Inputs, Method, hyper_for, method_named, with_settings
from kpatch.edit.preset_file import PresetFile, read_preset
from kpatch.edit.weights import add, restored
from kpatch.errors import BadInput
from kpatch.evaluate.metrics import Measurement, effect, measure
from kpatch.evaluate.retention import Retention, retention
from kpatch.facts.fact import Fact, FactFile, facts_in
from kpatch.facts.tokens import check_lengths
from kpatch.facts.wordings import LEARNED, require_mode, with_grammar, with_wordings
from kpatch.memory import bytes_given
from kpatch.models.fingerprint import tokenizer_hash
from kpatch.models.model import Model, open_model
from kpatch.models.placement import Limits
from kpatch.outputs import check_new_file
from kpatch.patch import size
from kpatch.patch.build import build_manifest
from kpatch.patch.format import pack, write_patch
from kpatch.patch.manifest import BaseWeight, Manifest
from kpatch.reporter import SILENT, Reporter
from kpatch.trace.files import read_layers


@dataclass(frozen=True)
class MakeResult:
    """The patch that was made, its effect, and what it cost: seconds, bytes, and facts of earlier patches.

    `retention` is None where the checkpoint carried no facts.
    """

    patch_id: str
    path: Path
    bytes: int
    model: str
    method: str
    layers: tuple[int, ...]
    effect: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    retention: Retention | None = None

    @property
    def edit_seconds(self) -> float:
        """What finding the edit took: values, update and refinement, without loading, statistics and measuring."""
        return sum(self.seconds.get(step, 0.0) for step in ("values", "update", "refining"))

    @property
    def facts(self) -> list[dict[str, Any]]:
        """One row per fact: text, target, answers and probabilities before and after."""
        return list(self.effect["facts"])


def make(
    facts: FactFile | Sequence[Fact],
    *,
    out: str | Path,
    model: str | Model | None = None,
    method: str | None = None,
    preset: str | Path | None = None,
    editor: str | Path | None = None,
    layers: Sequence[int] | None = None,
    layers_from: str | Path | None = None,
    wordings: str | None = None,
    corpus: str = "self",
    tokens: int | None = None,
    settings: dict[str, str] | None = None,
    on: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    memory: int | None = None,
    max_memory: Limits = None,
    modules: dict[str, str] | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> MakeResult:
    """Make a patch with MEMIT, or with another method by name, and write it to `out`.

    `preset` is a preset file (`kpatch.edit.preset_file`): what it says of method, layers, settings and wordings holds
    where the other arguments say nothing. `editor` is the file of a trained editor, which mend needs.

    `model` is an address or a loaded Model; `on` is a checkpoint directory that already carries patches and stands for
    the model. `memory` is the bytes that activations may take (default 1.5 GB), `max_memory` those that
    weights may (`kpatch.models.model.load_model`). `layers_from` is a trace.json that
    names the layers. `wordings` says in which other words facts are learned (`kpatch.facts.wordings`).
    The same inputs, seed and machine give the same patch, however many ranks (`kpatch.distributed`) share the work.
    Raises BadInput (facts, model, corpus, settings), Refused (`out` exists), Damaged (`on` was modified).
    """
    started = time.monotonic()
    file = None if preset is None else read_preset(preset)
    wanted = wordings or (file.wordings if file else None) or "auto"
    require_mode(wanted)
    given = facts_in(facts)
    if not given:
        raise BadInput("There are no facts to make a patch from")
    if layers is not None and layers_from is not None:
        raise BadInput("`layers` and `layers_from` exclude each other", hint="leave one of them out")
    if layers is not None and not all(type(layer) is int for layer in _listed(layers)):
        raise BadInput(f"`layers` is {layers!r}", details=["expected a list of whole numbers, as in [3, 4, 5]"])
    if settings is not None and not isinstance(settings, Mapping):
        raise BadInput(f"`settings` is a {type(settings).__name__}", details=['expected {"steps": "10"} and the like'])
    arguments.whole_number(tokens, "tokens")
    arguments.whole_number(seed, "seed")
    arguments.path(corpus, "corpus")
    arguments.path(out, "out")
    budget = bytes_given(memory, DEFAULT_BUDGET, "memory")
    check_new_file(out, force=force, what="a patch")  # before an hour of work, not after it
    chosen_method = method_named(method_wanted(method, file)).with_editor(editor)
    told = {**(file.settings if file else {}), **(settings or {})}
    with_settings(chosen_method.defaults(()), told)  # wrong ones are refused before the model is loaded
    edited = _load(facts, model, on, device, dtype, modules, report, max_memory)
    if layers_from is not None:
        layers = read_layers(layers_from, edited)
    chosen = with_wordings(given, wanted, report)
    if wanted == "auto":
        chosen = with_grammar(ask_for_wordings(edited, chosen, LEARNED, seed, report), report)
    check_lengths(edited.tokenizer, chosen)
    hyper = hyper_for(chosen_method, edited, layers, settings or {}, report, file)
    carried, gone = carried_by(edited.path) if on is not None and edited.path is not None else ((), {})
    protect = facts.protect if isinstance(facts, FactFile) else ()
    protect = protected(protect, carried, chosen)
    inputs = Inputs(str(corpus), tokens, seed, budget, resume, carried, gone, protect, report=report)
    return write_edit(edited, chosen, chosen_method, hyper, inputs, out=out, force=force, started=started)


def write_edit(
    model: Model,
    facts: Sequence[Fact],
    method: Method,
    hyper: Any,
    inputs: Inputs,
    *,
    out: str | Path,
    started: float,
    stack: tuple[Mapping[str, Any], ...] = (),
    force: bool = False,
) -> MakeResult:
    """Hash the base, measure, edit, measure the model as the patch makes it, and write the patch.

    `stack` names the patches that it holds, if it was made of others; `started` is when the work began
    (time.monotonic()). Ranks share what the method lets them share; otherwise rank 0 does it all.
    """

    def run() -> MakeResult:
        base = _base(model, method.weights(model, method.layers(hyper)), inputs.report)
        earlier = facts_that_stay(inputs.on, facts, inputs.gone)
        before, earlier_before = measure(model, facts, report=inputs.report), _measured(model, earlier, inputs)
        found = method.edit(model, facts, hyper, inputs)
        with restored(model, found.deltas):
            for name, delta in found.deltas.items():
                add(model, name, delta)
            after, earlier_after = measure(model, facts, report=inputs.report), _measured(model, earlier, inputs)
        base |= _base(model, sorted(found.deltas.keys() - base.keys()), inputs.report)
        measured = effect(before, after)
        manifest = _manifest(model, facts, method, hyper, inputs, found, base, measured, stack)
        tensors = pack(found.deltas, found.values, found.keys)
        identity, length = distributed.main_does(
            lambda: (write_patch(out, manifest, tensors, force), Path(out).stat().st_size)
        )
        large = size.warning(Path(out).name, size.size_of(manifest), size.FEWER)
        if large:
            inputs.report.warn(large)
        return MakeResult(
            patch_id=identity,
            path=Path(out),
            bytes=length,
            model=model.name,
            method=method.name,
            layers=found.layers,
            effect=measured,
            seconds={**inputs.seconds, "total": time.monotonic() - started},
            peak_memory_bytes=_peak_memory(model),
            retention=retention(earlier_before, earlier_after) if earlier_before and earlier_after else None,
        )

    return run() if method.ranks_share else distributed.main_does(run)


def method_wanted(name: str | None, file: PresetFile | None) -> str:
    """The method's name: the one that is asked for, else the preset file's. Raises BadInput where these differ."""
    if file is not None and name is not None and name != file.method:
        raise BadInput(
            f"The preset file is for {file.method}, and `method` is {name}",
            where=file.name,
            hint="leave one of them out",
        )
    return name or (file.method if file else "memit")


def refuse_two(on: object, model: object) -> None:
    """Raise BadInput where both `on` and `model` name the model."""
    if on is not None and model is not None:
        raise BadInput(
            "`on` and `model` exclude each other",
            details=["`on` names the checkpoint that the patch is made for"],
            hint="leave `model` out",
        )


def model_named(facts: FactFile | Sequence[Fact], model: str | Path | None) -> str | Path:
    """The address of the model: the one that is given, else the fact file's. Raises BadInput where there is none."""
    named = model or (facts.model if isinstance(facts, FactFile) else None)
    if named is None:
        raise BadInput(
            "No model was named", hint="name it with `model`, or write `model: smollm2` at the head of the fact file"
        )
    return named


def _listed(layers: object) -> list[object]:
    return list(layers) if isinstance(layers, Iterable) else [None]


def _load(
    facts: FactFile | Sequence[Fact],
    model: str | Model | None,
    on: str | Path | None,
    device: str,
    dtype: str,
    modules: dict[str, str] | None,
    report: Reporter,
    max_memory: Limits = None,
) -> Model:
    """The model in memory. Raises BadInput where none is named, two are, or it has no checkpoint directory."""
    refuse_two(on, model)
    if not isinstance(model, Model):
        address = on if on is not None else model_named(facts, model)
        model = open_model(address, device=device, dtype=dtype, modules=modules, max_memory=max_memory, report=report)
    if model.path is None:
        raise BadInput(
            f"{model.name} was not loaded from a checkpoint directory, so a patch cannot name its base",
            hint="give the model's address instead",
        )
    return model


def _measured(model: Model, facts: Sequence[Fact], inputs: Inputs) -> Measurement | None:
    """How the model takes earlier facts, without free answers; None where there are none."""
    bare = [replace(fact, paraphrases=(), neighbors=()) for fact in facts]
    return measure(model, bare, answer_tokens=0, report=inputs.report) if bare else None


def _base(model: Model, names: Sequence[str], report: Reporter) -> dict[str, BaseWeight]:
    """What the manifest says of the weights `names` as they are without any patch."""
    path = model.path
    assert path is not None
    return distributed.main_does(lambda: base_weights(path, names, report)) if names else {}


def _manifest(
    model: Model,
    facts: Sequence[Fact],
    method: Method,
    hyper: Any,
    inputs: Inputs,
    found: Edit,
    base: Mapping[str, BaseWeight],
    measured: dict[str, Any],
    stack: tuple[Mapping[str, Any], ...],
) -> Manifest:
    return build_manifest(
        base_name=model.name,
        family=model.family.model_type,
        revision=model.revision,
        tokenizer=tokenizer_hash(model.tokenizer),
        weights={name: base[name] for name in sorted(found.deltas)},
        transposed=model.stores_transposed,
        deltas=found.deltas,
        by_row=found.by_row,
        method=method.name,
        layers=found.layers,
        facts=tuple((fact if found.refined else replace(fact, further=())).in_manifest() for fact in facts),
        hyperparameters={
            **hyper.to_dict(),
            **found.origin,
            "seed": inputs.seed,
            "dtype": model.precision,
        },
        covariance=None if found.covariance is None else found.covariance.to_dict(),
        parents=tuple(patch.id for patch in inputs.on),
        effect=measured,
        groups=found.groups,
        protect=tuple(one.to_dict() for one in inputs.protect),
        stack=stack,
    )


def _peak_memory(model: Model) -> int:
    """The most memory this process has held, in bytes: resident memory, plus the device's where there is one."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if model.device.type == "cuda":
        peak += torch.cuda.max_memory_allocated(model.device)
    return peak
