"""The layer that fine-tuning edits where none is named: the one where tuned facts hold best in words not learned.

It is a property of the model, so it is found on facts of kpatch's own and kept in the cache by the model's weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kpatch.cache import atomic_write, cache_dir
from kpatch.edit.ft_rows import Check, learned_rows, other_rows
from kpatch.edit.ft_tuning import tune
from kpatch.edit.presets import FineTuneHyper
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.facts.relations import wordings_for
from kpatch.facts.tokens import Encoded, encode_many, item_of
from kpatch.models.fingerprint import weights_fingerprint
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter
from kpatch.trace.fact_lists import built_in

_VERSION = 1  # raise it when the search comes to find another layer
_TRIED = 6  # layers, evenly over the depth, before those next to the best
_FACTS, _OTHERS = 10, 16
_STEPS, _BATCH = 10, 2  # passes and rows an update: which layer is the best shows early


def find_layer(model: Model, report: Reporter = SILENT) -> int:
    """The layer with the least value (`ft_rows.Check`) after tuning validation facts there. Says what it found.

    Up to six layers over the depth of the model are tried, then the ones half way to the next.
    Raises BadInput where no layer below the last can be edited.
    """
    layers = [layer for layer in model.editable if layer < model.n_layers - 1]
    if not layers:
        raise BadInput(f"{model.name} has no layer below its last that can be edited")
    if len(layers) == 1:
        return layers[0]
    about = [_VERSION, weights_fingerprint(model, report), str(model.dtype), FineTuneHyper(()).to_dict()]
    path = cache_dir("ft-layers") / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.json"
    values = _search(model, layers, path, report)
    best = min(values, key=lambda layer: (values[layer], layer))
    told = ", ".join(f"{layer} {value:.2f}" for layer, value in sorted(values.items()))
    report.note(f"layer {best}: the least loss and drift of validation facts after tuning ({told})")
    return best


def _search(model: Model, layers: Sequence[int], path: Path, report: Reporter) -> dict[int, float]:
    """Values by layer. Each is kept at `path` when it is found, so that a search that was stopped goes on."""
    values = _read(path, layers)
    facts = validation_facts()
    rows, held = learned_rows(model, facts, FineTuneHyper(())), _reworded(model, facts)
    others = other_rows(model, facts, _OTHERS)

    def try_out(layer: int) -> None:
        if layer not in values:
            hyper = FineTuneHyper((layer,), steps=_STEPS, batch=_BATCH)
            values[layer] = min(tune(model, rows, hyper, 0, Check(model, held, others, layer)).values)
            _write(path, values)

    first = spread(len(layers), _TRIED)
    with report.task("Trying layers", len(first) + 2, "layer") as advance:
        for place in first:
            try_out(layers[place])
            advance(1)
        best = min(first, key=lambda place: values[layers[place]])
        for place in between(first, best, len(layers)):
            try_out(layers[place])
            advance(1)
    return values


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the positions 0 to count - 1, or all of them, each in the middle of an equal part."""
    wanted = min(count, wanted)
    return [int((place + 0.5) * count / wanted) for place in range(wanted)]


def between(tried: Sequence[int], best: int, count: int) -> list[int]:
    """The positions half way from `best` to those tried next to it, or to the ends; none that was tried."""
    at = tried.index(best)
    below = tried[at - 1] if at else -1
    above = tried[at + 1] if at + 1 < len(tried) else count
    return [place for place in ((below + best) // 2, (best + above) // 2) if 0 <= place < count and place not in tried]


def validation_facts() -> tuple[Fact, ...]:
    """Well-known facts with another's object for a target, one a relation that kpatch has other wordings for."""
    by_relation: dict[str, list[Fact]] = {}
    for fact in built_in():
        if wordings_for(fact.prompt, target=fact.target):
            by_relation.setdefault(fact.relation or "", []).append(fact)
    chosen = []
    for facts in by_relation.values():
        other = next((one.target for one in facts if one.target != facts[0].target), None)
        chosen += [replace(facts[0], target=other)] if other else []
    return tuple(chosen[:_FACTS])


def _reworded(model: Model, facts: Sequence[Fact]) -> list[Encoded]:
    """Each fact in a wording that it is not learned in."""
    reworded = [replace(fact, prompt=wordings_for(fact.prompt, target=fact.target)[0]) for fact in facts]
    return encode_many(model.tokenizer, [item_of(fact) for fact in reworded])


def _write(path: Path, values: Mapping[int, float]) -> None:
    text = json.dumps({str(layer): value for layer, value in values.items()})

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    atomic_write(path, write)


def _read(path: Path, layers: Sequence[int]) -> dict[int, float]:
    """Values that were kept; none where the file is not whole."""
    try:
        values = {int(layer): float(value) for layer, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return values if values.keys() <= set(layers) else {}
