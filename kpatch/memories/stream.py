"""One pass over a text for all layers: triggers of every unit, and what layers predict at sampled inputs.

Memory is bounded by the batch, by the triggers kept for each unit and by the inputs that wait for the head, not by
the length of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kpatch.errors import BadInput
from kpatch.memories.layer_memories import LayerMemories
from kpatch.memories.predictions import active_signs, effective_share, predicted_by_one
from kpatch.memories.triggers import Triggers
from kpatch.memories.values import Promoted, block_rows, promoted_logits, ranks_of, unit_values
from kpatch.models.model import Model
from kpatch.models.partial_forward import Batch, captured_inputs, record
from kpatch.reporter import Reporter

_WAITING = 128  # inputs that wait for the head together: it reads the whole vocabulary's weights for every batch
_RANKED = 64  # units of a layer whose rank of the following token is looked up


@dataclass
class _Layer:
    """What grows of one layer."""

    triggers: Triggers
    promoted: Tensor  # [2, f] on the device
    scale: float
    found: dict[str, list[Tensor]] = field(default_factory=dict)  # by name, each [s]
    signs: list[Tensor] = field(default_factory=list)  # waiting, each [s, f]
    states: list[Tensor] = field(default_factory=list)  # waiting: r, y and o, each [3, s, d]

    def note(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.found.setdefault(name, []).append(value.cpu())

    def all(self, name: str) -> Tensor:
        return torch.cat(self.found[name]) if name in self.found else torch.zeros(0)


class Stream:
    """The pass over `ids` [N], in rows of `row`; `places` are the sampled inputs, by their last token, rising."""

    def __init__(
        self, model: Model, ids: Tensor, row: int, places: Tensor, promoted: Mapping[int, Promoted], triggers: int
    ) -> None:
        self.model, self.ids, self.row, self.places = model, ids, row, places
        self.layers = {
            layer: _Layer(
                Triggers(model.key_width(layer), triggers, model.device),
                one.tokens.to(model.device),
                # A gate belongs to what the MLP puts out
                1.0 if model.gated(layer) else model.residual_scale(layer),
            )
            for layer, one in promoted.items()
        }
        self.promoted = promoted
        self._final: list[Tensor] = []

    @torch.no_grad()
    def run(self, batch_rows: int, report: Reporter) -> dict[int, LayerMemories]:
        """Everything about each layer. Raises BadInput for coefficients that are not finite."""
        whole = len(self.ids) // self.row
        with report.task("Memories of all layers", len(self.ids), "token") as advance:
            for first in range(0, whole, batch_rows):
                rows = min(batch_rows, whole - first)
                self._batch(first * self.row, rows, self.row)
                advance(rows * self.row)
            rest = len(self.ids) % self.row
            if rest:
                self._batch(whole * self.row, 1, rest)
                advance(rest)
            self._predict()
        return {layer: self._finish(layer, one) for layer, one in self.layers.items()}

    def _batch(self, first: int, rows: int, columns: int) -> None:
        ids = self.ids[first : first + rows * columns].view(rows, columns).to(self.model.device, torch.long)
        positions = torch.arange(columns, device=ids.device).expand(rows, columns)
        mine = self.places[(self.places >= first) & (self.places < first + rows * columns)].to(ids.device) - first
        calls = record(self.model, Batch(ids, torch.ones_like(ids), positions, 0))
        hidden = calls.start
        with captured_inputs(self.model, list(self.layers)) as keys, captured_outputs(self.model, self.layers) as outs:
            for layer in range(self.model.n_layers):
                hidden = calls.run(hidden, layer, layer + 1)
                if layer in self.layers:
                    key, out = keys.pop(layer).view(rows, columns, -1), outs.pop(layer).view(hidden.shape)
                    self._take(layer, key, out, hidden, first, mine)
        if len(mine):
            self._final.append(hidden.flatten(0, 1)[mine])
        if sum(map(len, self._final)) >= _WAITING:
            self._predict()

    def _take(self, layer: int, keys: Tensor, out: Tensor, hidden: Tensor, first: int, mine: Tensor) -> None:
        """Keep what one batch says of a layer: keys [B, T, f], m^l and what leaves the layer [B, T, d]."""
        one = self.layers[layer]
        if not bool(torch.isfinite(keys).all()):
            raise BadInput(
                f"Coefficients of layer {layer} of {self.model.name} are not finite",
                details=[f"found NaN or infinity in {self.model.dtype}"],
                hint="load the model in a wider type: `dtype=float32` or `dtype=bfloat16`",
            )
        one.triggers.add(keys, first)
        if not len(mine):
            return
        key, left = keys.flatten(0, 1)[mine], hidden.flatten(0, 1)[mine]
        added = one.scale * out.flatten(0, 1)[mine]
        signs = active_signs(key)
        one.note(
            active=(signs != 0).float().mean(-1),
            positive=(key > 0).float().mean(-1),
            effective=effective_share(key),
        )
        one.signs.append(signs)
        one.states.append(torch.stack([left - added, added, left]))

    def _predict(self) -> None:
        """Read what waits through the head, layer by layer."""
        if not self._final:
            return
        final = _tops(self.model, torch.cat(self._final))
        for one in self.layers.values():
            states, signs = torch.cat(one.states, 1), torch.cat(one.signs)  # (3, s, d), (s, f)
            one.states, one.signs = [], []
            residual, chance = _tops_and(self.model, states[0], final)
            layer, out = _tops(self.model, states[1]), _tops(self.model, states[2])
            one.note(
                alone=predicted_by_one(signs, one.promoted, layer),
                residual_top=residual.int(),
                layer_top=layer.int(),
                out_top=out.int(),
                final_top=final.int(),
                final_chance=chance,
            )
        self._final = []

    def _finish(self, layer: int, one: _Layer) -> LayerMemories:
        one.triggers.settle()
        units = torch.arange(0, one.promoted.shape[1], max(1, one.promoted.shape[1] // _RANKED))
        units, ranks = self._ranks(layer, one.triggers, units)
        inputs = ("active", "positive", "effective", "alone", "residual_top", "layer_top", "out_top")
        return LayerMemories(
            layer,
            one.triggers.strengths.cpu(),
            one.triggers.places.cpu(),
            one.triggers.before.cpu(),
            self.promoted[layer].tokens,
            self.promoted[layer].chances,
            units,
            ranks,
            **{name: one.all(name) for name in (*inputs, "final_top", "final_chance")},
        )

    def _ranks(self, layer: int, triggers: Triggers, units: Tensor) -> tuple[Tensor, Tensor]:
        """Those of `units` that have a trigger, and the rank of the token behind it in what their value promotes."""
        strengths, places = triggers.strengths[:, units, 0].cpu(), triggers.places[:, units, 0].cpu()
        sides = strengths.argmax(0)
        fired = strengths.amax(0) > 0
        units, sides, places = units[fired], sides[fired], places[:, fired]
        follow = self.ids[places[sides, range(len(units))].long() + 1].long()
        values = unit_values(self.model, layer, units) * (1 - 2 * sides)[:, None].to(self.model.device)
        found = [
            ranks_of(promoted_logits(self.model, layer, block), tokens)
            for block, tokens in zip(
                torch.split(values, block_rows(self.model)), torch.split(follow, block_rows(self.model)), strict=True
            )
        ]
        return units.int(), torch.cat(found).cpu().int() if len(units) else units.int()


def sample_places(tokens: int, row: int, count: int, seed: int) -> Tensor:
    """The last tokens of `count` inputs, rising, never in the first or last column of a row; fewer if need be.

    Drawn from a generator of their own: the same text and seed give the same inputs.
    """
    places = torch.arange(tokens)
    column, last = places % row, torch.clamp((places // row + 1) * row, max=tokens) - 1
    places = places[(column > 0) & (places < last)]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    return places[order[:count]].sort().values


@contextmanager
def captured_outputs(model: Model, layers: Sequence[int] | Mapping[int, object]) -> Iterator[dict[int, Tensor]]:
    """While open, every call leaves what the MLPs of `layers` add to the residual stream in the dict given."""
    outputs: dict[int, Tensor] = {}
    handles = []
    for index in layers:

        def hook(module: nn.Module, inputs: object, out: object, index: int = index) -> None:
            found = out[0] if isinstance(out, tuple) else out
            assert isinstance(found, Tensor)
            outputs[index] = found.clone().to(model.device)  # some layers add to it in place

        handles.append(model.mlp_out(index).register_forward_hook(hook))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _tops(model: Model, states: Tensor) -> Tensor:
    """First choices [s] of states [s, d] through the final norm and the head."""
    return torch.cat([model.logits(block).argmax(-1) for block in torch.split(states, block_rows(model))])


def _tops_and(model: Model, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """First choices [s], and the probability [s] of `tokens` [s]."""
    tops, chances = [], []
    size = block_rows(model)
    for block, wanted in zip(torch.split(states, size), torch.split(tokens, size), strict=True):
        logits = model.logits(block).float()
        tops.append(logits.argmax(-1))
        chances.append((logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1)).exp())
    return torch.cat(tops), torch.cat(chances)
