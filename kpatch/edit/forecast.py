"""What a patch will take before it is made: memory, disk and time, from shapes and counts, without the weights.

Bytes come from shapes. Time comes from counted multiply-adds and from rates measured now, on products of a layer's
shape. Attention, norms, reading and writing are not counted, so a small model takes longer than it says; half of the
steps of the search are counted, as most facts converge early.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kpatch.edit.earlier import carried_by, facts_to_hold, facts_to_learn_again
from kpatch.edit.make import method_wanted, model_named, refuse_two
from kpatch.edit.memit import Memit
from kpatch.edit.methods import DEFAULT_BUDGET, Inputs, hyper_for, method_named
from kpatch.edit.preset_file import read_preset
from kpatch.edit.refine import looked_at
from kpatch.edit.requests import Group, group_facts
from kpatch.edit.unpatched import base_fingerprint
from kpatch.edit.values_cache import plan
from kpatch.errors import BadInput
from kpatch.evaluate.answers import ANSWER_TOKENS
from kpatch.facts.fact import Fact, FactFile, facts_in
from kpatch.facts.tokens import Item, encode_many
from kpatch.facts.wordings import require_mode, with_grammar, with_wordings
from kpatch.memory import bytes_given
from kpatch.models.address import resolve
from kpatch.models.model import Model
from kpatch.models.placement import Limits, device_named, limits_checked, spread
from kpatch.models.skeleton import skeleton
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.corpus import SELF
from kpatch.stats.covariance import BATCH_TOKENS, sums_size
from kpatch.stats.self_text import group_rows
from kpatch.stats.subject_keys import told
from kpatch.stats.text import Text, open_text
from kpatch.trace.files import read_layers

_BASE = 600_000_000  # the interpreter and its libraries, in bytes
_SHARE = 0.5  # of the steps that a fact may take; on SmolLM2 facts took 0.42 (few facts a subject) to 0.66 of 60
_BESIDE = 2.2  # what a step of refinement costs, against its rows of facts alone (measured on SmolLM2)
_HOW = "counted multiply-adds over rates measured now; attention and norms are not counted"


@dataclass(frozen=True)
class Forecast:
    """What making a patch will take. Memory and disk in bytes, seconds by step, rates in multiply-adds a second.

    `earlier` counts the facts of patches that the checkpoint carries, which are held or learned again.
    """

    model: str
    method: str
    layers: tuple[int, ...]
    facts: int
    rows: int
    earlier: int
    covariance: dict[str, Any]
    memory: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float]
    rates: dict[str, float]
    how: str = _HOW

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "layers": list(self.layers)}


def forecast(
    facts: FactFile | Sequence[Fact],
    *,
    model: str | Path | None = None,
    method: str | None = None,
    preset: str | Path | None = None,
    layers: Sequence[int] | None = None,
    layers_from: str | Path | None = None,
    wordings: str | None = None,
    corpus: str = SELF,
    tokens: int | None = None,
    settings: dict[str, str] | None = None,
    on: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    memory: int | None = None,
    max_memory: Limits = None,
    modules: dict[str, str] | None = None,
    report: Reporter = SILENT,
) -> Forecast:
    """What `make` with these arguments will take. No weight is loaded; files of weights are hashed, as `make` does.

    Raises BadInput as `make` does before it loads a model, and for a method whose rows only the model can tell.
    """
    file = None if preset is None else read_preset(preset)
    refuse_two(on, model)
    named = model_named(facts, on or model)
    way = method_named(method_wanted(method, file))
    if not isinstance(way, Memit) or type(way).contexts is not Memit.contexts:
        raise BadInput(
            f"What {way.name} will take cannot be said ahead",
            details=["`plan` knows `method` memit"],
            hint="leave it out",
        )
    budget = bytes_given(memory, DEFAULT_BUDGET, "memory")
    wording = wordings or (file.wordings if file else None) or "auto"
    require_mode(wording)
    empty = skeleton(resolve(str(named), report), device=device, dtype=dtype, modules=modules)
    chosen = with_wordings(facts_in(facts), wording, report)
    if wording == "auto":  # what the model itself would be asked for is not known
        chosen = with_grammar(chosen, report)
    if layers_from is not None:
        layers = read_layers(layers_from, empty)
    carried, gone = carried_by(empty.path) if on is not None and empty.path is not None else ((), {})
    if carried and empty.path is not None:  # C is the base's
        empty.weights_id = base_fingerprint(empty.path, report)
    told = [*chosen, *facts_to_learn_again(carried, chosen, report, gone)]
    beside = [fact for some in facts_to_hold(carried, chosen, gone) for fact in some]
    hyper = hyper_for(way, empty, layers, settings or {}, report, file)
    inputs = Inputs(corpus=corpus, tokens=tokens, seed=seed, report=report)
    contexts = way.contexts(empty, hyper, inputs)
    groups = group_facts(empty, told, contexts, way.spare(hyper), way.chat(hyper), way.others(hyper))
    held = group_facts(empty, beside, contexts, way.spare(hyper), min(1, way.chat(hyper))) if beside else []
    edited = tuple(sorted({layer for part in way.parts(groups, hyper) for layer in part.hyper.layers}))
    wanted = tokens or 10 * max(map(empty.key_width, edited))
    text = open_text(empty, corpus, wanted, seed=seed, report=report)
    missing = [layer for layer in edited if not text.cache.has_layer(layer, wanted)]
    offloaded = _offloaded(empty, device, max_memory)
    rates = _rates(empty, device_named(device), group_rows(empty, text.row))
    cached = [layer for layer in edited if layer not in missing]
    return Forecast(
        model=empty.name,
        method=way.name,
        layers=edited,
        facts=len(chosen),
        rows=sum(len(group.rows) for group in groups),
        earlier=len(told) - len(chosen) + len(beside),
        covariance={"tokens": wanted, "corpus": text.name, "cached": cached, "missing": missing},
        memory=_memory(empty, edited, missing, budget, offloaded, bool(carried)),
        disk=_disk(empty, groups, edited, missing, offloaded),
        seconds=_seconds(empty, text, [*told, *beside], groups, held, hyper, edited, missing, rates),
        rates=rates,
    )


def _offloaded(model: Model, device: str, limits: Limits) -> int:
    """Bytes of weights that stay on the disk."""
    where = device_named(device)
    placed = spread(model.net.config, model.family, where, model.dtype, device, limits_checked(limits), model.name)
    return 0 if placed is None else placed.taken.get("disk", 0)


def _memory(
    model: Model, edited: Sequence[int], missing: Sequence[int], budget: int, offloaded: int, chain: bool
) -> dict[str, int]:
    seen = {id(one): one for one in model.net.parameters()}
    copied = 2 * (model.mixed and not offloaded)  # in bfloat16; the layers of a spread model have none
    weights = sum(one.numel() * (one.dtype.itemsize + copied) for one in seen.values()) - offloaded
    copies = (4 if chain else 2) * sum(model.weight(layer).numel() * model.dtype.itemsize for layer in edited)
    widest = max(map(model.key_width, edited))
    moments = (len(edited) + len(missing)) * sums_size(model.key_width(edited[0])) + 3 * widest * widest * 8
    parts = {"weights": weights, "edited_weights": copies, "covariance": moments, "activations": budget, "base": _BASE}
    return {**parts, "total": sum(parts.values())}


def _disk(
    model: Model, groups: Sequence[Group], edited: Sequence[int], missing: Sequence[int], offloaded: int
) -> dict[str, int]:
    """The patch, at most: factors, values and keys of every group. The cache: moments of text and of subjects.

    Weights that stay on the disk may be written there once more, in the dtype in which they are held.
    """
    n = len(groups)
    patch = 0
    for layer in edited:
        f, d = model.key_width(layer), model.width
        patch += 4 * (min(n * (f + d), f * d) + n * (f + d))
    cache = 2 * sum(sums_size(model.key_width(layer)) for layer in missing)
    parts = {"patch": patch, "cache": cache, **({"weights": offloaded} if offloaded else {})}
    return {**parts, "total": sum(parts.values())}


def _seconds(
    model: Model,
    text: Text,
    facts: Sequence[Fact],
    groups: Sequence[Group],
    held: Sequence[Group],
    hyper: Any,
    edited: Sequence[int],
    missing: Sequence[int],
    rates: dict[str, float],
) -> dict[str, float]:
    # Multiply-adds for one token: of a layer on average, of the head, of all
    matrices = (one for index in range(model.n_layers) for one in model.layer(index).parameters() if one.ndim >= 2)
    a_layer, head = sum(one.numel() for one in matrices) // model.n_layers, int(model.config.vocab_size) * model.width
    whole = model.n_layers * a_layer + head
    sampling = covariance = 0.0
    if missing:
        size = group_rows(model, text.row) * text.row
        new = [number for number in range(-(-text.tokens // size)) if not text.cache.has_group(number)]
        if text.source is None:
            sampling = len(new) * size * whole / rates["one_token_a_row"]
        spoken = encode_many(model.tokenizer, [Item(template, name) for template, name in told()])
        passed = text.tokens + sum(row.subject_last + 1 for row in spoken)
        sums = sum(model.key_width(layer) ** 2 / 2 for layer in missing)
        covariance = passed * ((max(missing) + 1) * a_layer + sums) / rates["many_tokens"]
    above = model.n_layers - edited[0]
    step = once = 0.0
    for batch in plan(model, groups, edited[0]):
        for group in (groups[index] for index in batch):
            rows = [*group.rows, *group.drifts]
            once += sum(len(row.ids) for row in rows) * model.n_layers * a_layer
            step += sum(len(row.ids) - row.subject_last for row in rows) * above * a_layer
            step += sum(max(1, len(row.ids) - row.prompt_len) for row in rows) * head
    values = (once + 2 * _SHARE * hyper.steps * step) / rates["rows_of_facts"]  # forward and back
    reached = [*groups, *held, *held]  # keys of held facts with the earlier patches, and without
    keys = sum(row.subject_last + 1 for group in reached for row in group.rows) * (edited[-1] + 1) * a_layer
    solves = sum(model.key_width(layer) ** 3 / 3 for layer in edited)
    update = keys / rates["rows_of_facts"] + solves / rates["float64"]
    asked = [item for fact in facts for item in _questions(fact)]
    lengths = sum(len(ids) for ids in model.tokenizer(asked).input_ids)
    measuring = 2 * (lengths * whole / rates["rows_of_facts"])
    measuring += 2 * len(asked) * ANSWER_TOKENS * whole / rates["one_token_a_row"]
    count = len({index for group in groups for index in group.facts})
    looks = hyper.refine * looked_at(len(groups), hyper.refine) / len(groups)  # at every group
    refining = _BESIDE * looks * (once + 3 * step) / rates["rows_of_facts"] if hyper.refines(count) else 0.0
    found = {"sampling": sampling, "covariance": covariance, "values": values, "update": update}
    found |= {"refining": refining, "measuring": measuring}
    return {**found, "total": sum(found.values())}


def _questions(fact: Fact) -> list[str]:
    return [fact.text(), *fact.paraphrases, *(one.prompt for one in fact.neighbors)]


@torch.no_grad()
def _rates(model: Model, device: torch.device, rows: int) -> dict[str, float]:
    """Multiply-adds a second of products of a layer's shape, measured for less than a second each."""
    d, f, dtype = model.width, model.mlp_width, torch.bfloat16 if model.mixed else model.dtype

    def rate(tokens: int, kind: torch.dtype, width: int) -> float:
        a, b = torch.randn(tokens, d).to(device, kind), torch.randn(d, width).to(device, kind)
        counted, begin = 0, 0.0
        for number in range(200):
            if number == 1:  # the first run warms up
                begin = time.perf_counter()
            (a @ b).sum().item()
            counted += number > 0
            if counted > 1 and time.perf_counter() - begin > 0.4:
                break
        return counted * tokens * d * width / (time.perf_counter() - begin)

    return {
        "many_tokens": rate(BATCH_TOKENS, dtype, f),
        "rows_of_facts": rate(256, dtype, f),
        "one_token_a_row": rate(rows, dtype, f),
        "float64": rate(512, torch.float64, min(f, 2048)),
    }
