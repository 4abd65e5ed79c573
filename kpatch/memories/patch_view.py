"""A patch as changes to key-value memories: which units a fact is written through, and what the written value says.

For a fact with key k a layer puts out Δ k more than before: the sum over units of k_i times column i of Δ. A unit's
share is how much of Δ k goes through it, k_i ⟨Δ_i, Δ k⟩ / ‖Δ k‖²; the shares of all units add up to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.evaluate.patched import check_fit
from kpatch.facts.fact import Fact
from kpatch.facts.tokens import encode_many, encode_target, item_of
from kpatch.memories.units import Unit
from kpatch.memories.values import promoted_logits, ranks_of, token_text, top_tokens, unit_values
from kpatch.memories.words import as_objects
from kpatch.models.model import Model
from kpatch.models.partial_forward import align, run_to
from kpatch.patch.delta import Delta
from kpatch.patch.format import Patch
from kpatch.patch.summands import key_rows
from kpatch.reporter import SILENT, Reporter

_TOP = 8  # tokens
_ROWS = 16  # prompts at a time, where the patch stores no keys


@dataclass(frozen=True)
class TouchedUnit:
    """A unit that a fact is written through: its share of Δ k, its coefficient, and what it promotes, by that sign."""

    unit: Unit
    share: float
    coefficient: float
    before: tuple[tuple[str, float], ...]
    after: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class LayerWrite:
    """What a layer writes for a fact.

    size  ‖Δ k‖ over ‖W k‖, what the layer put out before
    promotes  the tokens that Δ k promotes; rank, that of the target's first token, 1 is top
    """

    layer: int
    size: float
    promotes: tuple[tuple[str, float], ...]
    rank: int
    units: tuple[TouchedUnit, ...]


@dataclass(frozen=True)
class FactWrite:
    """A fact's writes, layer by layer, and what their sum promotes: None behind norms, which no sum goes through."""

    fact: Fact
    target: str
    layers: tuple[LayerWrite, ...]
    together: tuple[tuple[str, float], ...] | None
    rank: int | None


def view_patch(
    model: Model, patch: Patch, *, facts: int | None = None, units: int = 3, report: Reporter = SILENT
) -> list[FactWrite]:
    """The writes of the patch's first `facts` facts (all), each layer with the `units` it goes through most.

    Keys are those that the patch stores, of a fact's first group; else those of the bare prompts in `model`, the
    patch's base. Raises Refused for another model, BadInput for a patch without facts or without a change of an MLP's
    output projection.
    """
    check_fit(model, patch)
    names = {model.weight_name(layer): layer for layer in model.editable}
    deltas = {names[name]: delta for name, delta in patch.deltas.items() if name in names}
    told = [Fact.from_dict(fact) for fact in patch.manifest.facts[:facts]]
    if not told or not deltas:
        lacking = "no facts" if not told else "no change of an MLP's output projection"
        raise BadInput(
            f"Patch {patch.id[:12]} holds {lacking}, so it writes nothing that could be shown",
            hint="leave `memories` out",
        )
    own = _own_keys(model, told, sorted(deltas)) if any(layer not in patch.keys for layer in deltas) else {}
    found = []
    with report.task("What the patch writes", len(told), "fact") as advance:
        for number, fact in enumerate(told):
            keys = {layer: key for layer in deltas if (key := _stored(patch, layer, number)) is not None}
            keys |= {layer: own[layer][number] for layer in deltas if layer not in keys and layer in own}
            found.append(_written(model, deltas, fact, keys, units))
            advance(1)
    return found


def _stored(patch: Patch, layer: int, fact: int) -> Tensor | None:
    """The key [f] that the patch stores for a fact in a layer; None where it has none."""
    if layer not in patch.keys:
        return None
    rows = key_rows(patch.manifest, layer)
    row = next((row for row, (facts, _) in enumerate(rows) if fact in facts), None)
    return None if row is None else patch.keys[layer][row]


@torch.no_grad()
def _own_keys(model: Model, facts: Sequence[Fact], layers: Sequence[int]) -> dict[int, Tensor]:
    """Keys [n, f] by layer at the last subject tokens of the bare prompts."""
    encoded = encode_many(model.tokenizer, [item_of(fact) for fact in facts])
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for begin in range(0, len(encoded), _ROWS):
        rows = [one.ids[: one.subject_last + 1] for one in encoded[begin : begin + _ROWS]]
        batch = align(rows, [len(row) - 1 for row in rows], model.pad_id, model.device)
        for layer, keys in run_to(model, layers[-1], batch, layers).items():
            parts[layer].append(keys[:, -1].float().cpu())
    return {layer: torch.cat(keys) for layer, keys in parts.items()}


@torch.no_grad()
def _written(
    model: Model, deltas: Mapping[int, Delta], fact: Fact, keys: Mapping[int, Tensor], most: int
) -> FactWrite:
    first = encode_target(model.tokenizer, fact.text(), fact.target, fact.space)[0]
    target = torch.tensor([first])
    layers = []
    together: Tensor | None = None
    for layer, key in sorted(keys.items()):
        columns = _columns(model, deltas[layer])  # (f, d)
        key = key.double()
        written = key @ columns  # (d,)
        shares = key * (columns @ written) / written.square().sum().clamp(min=1e-300)
        logits = promoted_logits(model, layer, written[None])
        before = key @ unit_values(model, layer).double().cpu()
        top = shares.topk(min(most, len(shares))).indices
        layers.append(
            LayerWrite(
                layer,
                float(written.norm() / before.norm()),
                top_tokens(model, logits[0], _TOP),
                int(ranks_of(logits, target)[0]),
                tuple(_touched(model, layer, columns, key, shares, top)),
            )
        )
        if not model.behind_down(layer):
            summed = model.residual_scale(layer) * written
            together = summed if together is None else together + summed
    if together is None or any(model.behind_down(layer) for layer in keys):
        return FactWrite(fact, token_text(model, first), tuple(layers), None, None)
    logits = promoted_logits(model, max(keys), together[None])
    return FactWrite(
        fact,
        token_text(model, first),
        tuple(layers),
        top_tokens(model, logits[0], _TOP),
        int(ranks_of(logits, target)[0]),
    )


def _touched(
    model: Model, layer: int, columns: Tensor, key: Tensor, shares: Tensor, top: Tensor
) -> Iterator[TouchedUnit]:
    signs = key[top].sign()[:, None]
    old = unit_values(model, layer, top).double().cpu()
    before = promoted_logits(model, layer, signs * old)
    after = promoted_logits(model, layer, signs * (old + columns[top]))
    for place, unit in enumerate(top.tolist()):
        yield TouchedUnit(
            Unit(layer, unit),
            float(shares[unit]),
            float(key[unit]),
            top_tokens(model, before[place], _TOP),
            top_tokens(model, after[place], _TOP),
        )


def _columns(model: Model, delta: Delta) -> Tensor:
    """What Δ adds to each unit's value: [f, d] float64."""
    dense = delta.dense()
    return dense if model.stores_transposed else dense.T


def to_dict(one: FactWrite) -> dict[str, Any]:
    """The JSON object of a fact's writes."""
    return {
        "text": one.fact.text(),
        "target": one.fact.target,
        "first_token": one.target,
        "together": None if one.together is None else {"promotes": as_objects(one.together), "target_rank": one.rank},
        "layers": [
            {
                "layer": layer.layer,
                "size": layer.size,
                "promotes": as_objects(layer.promotes),
                "target_rank": layer.rank,
                "units": [
                    {
                        "unit": unit.unit.number,
                        "share": unit.share,
                        "coefficient": unit.coefficient,
                        "before": as_objects(unit.before),
                        "after": as_objects(unit.after),
                    }
                    for unit in layer.units
                ],
            }
            for layer in one.layers
        ],
    }
