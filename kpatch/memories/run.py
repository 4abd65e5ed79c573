"""From a model and a text to its memories: what the cache has, one pass for the rest, and the units looked at."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.memories.layer_memories import LayerMemories, from_tensors
from kpatch.memories.removal import CUT, Prefix, Removal, without_tokens
from kpatch.memories.stream import Stream, sample_places
from kpatch.memories.triggers import SIGNS
from kpatch.memories.units import Unit, parse_units, require_units, sample_units
from kpatch.memories.values import all_promoted, promoted_logits, ranks_of, token_text, top_tokens, unit_values
from kpatch.models.model import Model, require_loaded
from kpatch.models.module_names import require_places
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.cache import canonical
from kpatch.stats.corpus import SELF, row_start
from kpatch.stats.covariance import BATCH_TOKENS
from kpatch.stats.text import Text, open_text

# Anything that changes what is kept in the cache changes this number
VERSION = 1
ROW = 128  # tokens that see each other: a few sentences, and the row of text that the model writes itself
TRIGGERS = 25  # as many as the paper's annotators saw
TOP = 10  # tokens that a value promotes most


@dataclass(frozen=True)
class Trigger:
    """A prefix that triggers a unit: its text, its last token and the one that followed, and the coefficient.

    `before` is the coefficient where the last token is left out; `removal` what else removing tokens does, if tried.
    """

    text: str
    last: str
    following: str
    coefficient: float
    before: float
    removal: Removal | None = None


@dataclass(frozen=True)
class Side:
    """One sign of a unit's coefficient: what triggers it, strongest first, and the tokens that ±v promotes.

    `rank` is that of the token which followed the strongest trigger; `agrees` where it is 1.
    """

    sign: int
    triggers: tuple[Trigger, ...]
    promotes: tuple[tuple[str, float], ...]
    rank: int | None

    @property
    def agrees(self) -> bool:
        return self.rank == 1


@dataclass(frozen=True)
class UnitMemory:
    """A unit and its sides that some prefix triggers, the stronger one first."""

    unit: Unit
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Memories:
    """Everything that was found. `ids` [N] is the text, in rows of `row`; `named` says that the units were chosen."""

    model: str
    corpus: str
    row: int
    layers: dict[int, LayerMemories]
    units: tuple[UnitMemory, ...]
    named: bool
    seconds: float
    ids: Tensor = field(repr=False)

    @property
    def tokens(self) -> int:
        return len(self.ids)


def find_memories(
    model: Model,
    *,
    units: Sequence[str] | None = None,
    sample: int = 10,
    layers: Sequence[int] | None = None,
    corpus: str = SELF,
    tokens: int | None = None,
    inputs: int = 400,
    removals: int = 2,
    seed: int = 0,
    use_cache: bool = True,
    report: Reporter = SILENT,
) -> Memories:
    """The memories of `layers` (all) over the first `tokens` tokens of `corpus`, read as the covariance reads it.

    `units` are names, 12.345; else `sample` of each layer are drawn. `tokens` is 10 f unless given; predictions are
    looked at in `inputs` prefixes, and tokens are removed from the `removals` strongest triggers of each unit.
    One pass over the text serves all layers; the cache keeps it. Raises BadInput for units and layers that the model
    lacks, a text that is too short or cannot be read, and coefficients that are not finite.
    """
    started = time.monotonic()
    require_loaded(model)
    for name, value, least in (("sample", sample, 0), ("inputs", inputs, 1), ("removals", removals, 0)):
        if value < least:
            raise BadInput(f"`{name}={value}` is too small", details=[f"expected {least} or more"])
    named = None if units is None else parse_units(units)
    wanted = sorted(set(model.editable if layers is None else layers) | {unit.layer for unit in named or ()})
    if named is not None:
        every = {layer: model.key_width(layer) for layer in model.editable}
        require_units(named, every, model.name)
        wanted = sorted({unit.layer for unit in named}) if layers is None else wanted
    require_places(model, wanted)
    tokens = 10 * model.mlp_width if tokens is None else tokens
    if tokens < 3:
        raise BadInput("Memories need more tokens", details=[f"expected 3 or more, found `tokens={tokens}`"])
    text = open_text(model, corpus, tokens, seed=seed, row=ROW, report=report, use_cache=use_cache)
    with text.cache.locked():
        ids = text.ids()
        found = _layers(model, text, ids, wanted, inputs, report)
    chosen = named if named is not None else sample_units({a: b.width for a, b in found.items()}, sample, seed)
    seen = _units(model, text, ids, found, chosen, removals, report)
    seconds = time.monotonic() - started
    return Memories(model.name, text.name, text.row, found, seen, named is not None, seconds, ids)


def _layers(
    model: Model, text: Text, ids: Tensor, wanted: Sequence[int], inputs: int, report: Reporter
) -> dict[int, LayerMemories]:
    """Each layer from the cache, or from one pass for all that it lacks."""
    about = {"version": VERSION, "tokens": text.tokens, "inputs": inputs, "seed": text.seed, "triggers": TRIGGERS}
    digest = hashlib.sha256(canonical(about).encode()).hexdigest()[:16]
    names = {layer: f"memories-{layer}-{digest}.safetensors" for layer in wanted}
    found: dict[int, LayerMemories] = {}
    for layer, name in names.items():
        kept = text.cache.kept(name, partial(from_tensors, layer=layer, width=model.key_width(layer)))
        if kept is not None:
            found[layer] = kept
    missing = [layer for layer in wanted if layer not in found]
    if not missing:
        report.note(f"Memories from the cache: {text.name}, {text.tokens:,} tokens")
        return found
    with report.task("What values promote", len(missing), "layer") as advance:
        promoted = {}
        for layer in missing:
            promoted[layer] = all_promoted(model, layer)
            advance(1)
    places = sample_places(len(ids), text.row, inputs, text.seed)
    stream = Stream(model, ids, text.row, places, promoted, TRIGGERS)
    for layer, one in stream.run(max(1, BATCH_TOKENS // text.row), report).items():
        text.cache.keep(names[layer], one.to_tensors(), {**about, "layer": layer})
        found[layer] = one
    return {layer: found[layer] for layer in wanted}


# Units


def _units(
    model: Model,
    text: Text,
    ids: Tensor,
    layers: dict[int, LayerMemories],
    units: Sequence[Unit],
    removals: int,
    report: Reporter,
) -> tuple[UnitMemory, ...]:
    found: list[UnitMemory] = []
    with report.task("Triggers and values of units", len(units), "unit") as advance:
        for layer in sorted({unit.layer for unit in units}):
            mine = [unit for unit in units if unit.layer == layer]
            found += _of_layer(model, text, ids, layers[layer], mine, removals)
            advance(len(mine))
    return tuple(found)


@torch.no_grad()
def _of_layer(
    model: Model, text: Text, ids: Tensor, layer: LayerMemories, units: Sequence[Unit], removals: int
) -> list[UnitMemory]:
    tried = _removals(model, text, ids, layer, units, removals)
    start = len(row_start(model))  # a BOS is no text
    values = unit_values(model, layer.layer, torch.tensor([unit.number for unit in units]))
    found = []
    for unit, value in zip(units, values, strict=True):
        sides = []
        for side, sign in enumerate(SIGNS):
            places = [place for place in layer.places[side, unit.number].tolist() if place >= 0]
            if not places:
                continue
            logits = promoted_logits(model, layer.layer, sign * value[None])
            strengths, before = layer.strengths[side, unit.number], layer.before[side, unit.number]
            triggers = tuple(
                Trigger(
                    model.tokenizer.decode(ids[place // text.row * text.row + start : place + 1].tolist()),
                    token_text(model, int(ids[place])),
                    token_text(model, int(ids[place + 1])),
                    sign * float(strengths[number]),
                    float(before[number]),
                    tried.get((unit, side, number)),
                )
                for number, place in enumerate(places)
            )
            rank = int(ranks_of(logits, ids[places[0] + 1][None])[0])
            sides.append(Side(sign, triggers, top_tokens(model, logits[0], TOP), rank))
        sides.sort(key=lambda one: -abs(one.triggers[0].coefficient))
        found.append(UnitMemory(unit, tuple(sides)))
    return found


def _removals(
    model: Model, text: Text, ids: Tensor, layer: LayerMemories, units: Sequence[Unit], most: int
) -> dict[tuple[Unit, int, int], Removal]:
    """What removing tokens does to the strongest triggers of each unit's stronger side, by unit, side and number."""
    stronger = layer.stronger()
    start = row_start(model)
    where, prefixes = [], []
    for unit in units:
        side = int(stronger[unit.number])
        for number, place in enumerate(layer.places[side, unit.number, :most].tolist()):
            if place >= 0:
                begin = max(place // text.row * text.row + len(start), place + 1 - CUT)
                where.append((unit, side, number))
                prefixes.append(Prefix(unit.number, tuple(ids[begin : place + 1].tolist())))
    return dict(zip(where, without_tokens(model, layer.layer, prefixes, start, text.seed), strict=True))
