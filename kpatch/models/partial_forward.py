"""Partial runs: a batch's layer calls recorded once, then any range of layers run on any hidden states.

Every family's own forward decides masks, positions and rotary tables. We let it run once with its layers
replaced by recorders, which costs an embedding look-up, and keep the arguments it gave to each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from kpatch.models.model import Model


@dataclass(frozen=True)
class Batch:
    """Rows of token ids aligned on one column: padded on the left before it and on the right after it.

    ids, mask, positions [B, T]; `column` is the index at which every row has its aligned token.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    column: int

    def cut(self, first: int, last: int | None = None) -> Batch:
        """The same rows, columns first to last only (the mask keeps every column up to last)."""
        return Batch(self.ids[:, first:last], self.mask[:, :last], self.positions[:, first:last], self.column - first)


def align(rows: Sequence[Sequence[int]], columns: Sequence[int], pad_id: int, device: Any = "cpu") -> Batch:
    """Put rows of ids side by side so that rows[i][columns[i]] stands in one column."""
    column = max(columns)
    total = column + max(len(row) - at for row, at in zip(rows, columns, strict=True))
    ids = torch.full((len(rows), total), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), total), dtype=torch.long)
    for index, (row, at) in enumerate(zip(rows, columns, strict=True)):
        start = column - at
        ids[index, start : start + len(row)] = torch.tensor(row)
        mask[index, start : start + len(row)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(ids.to(device), mask.to(device), positions.to(device), column)


class Prefix:
    """Keys and values of columns that no longer change, one pair per layer [B, heads, P, head width].

    Stands where a layer expects its cache: it joins new columns to the kept ones and keeps nothing.
    """

    def __init__(self, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self.pairs[layer_idx]
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(next(iter(self.pairs.values()))[0].shape[2])

    def select(self, rows: Tensor) -> Prefix:
        return Prefix({layer: (k[rows.to(k.device)], v[rows.to(v.device)]) for layer, (k, v) in self.pairs.items()})

    def only(self, layer: int) -> Prefix:
        return Prefix({layer: self.pairs[layer]})


@dataclass
class Calls:
    """What enters layer 0, and the arguments with which each layer is called, for one batch.

    start [B, T, d]. Partial runs over the same batch need nothing else. With `before`, the states [B, P, d] that
    enter each layer on columns that never change, each layer runs on those and the new ones together.
    """

    model: Model
    start: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    before: dict[int, Tensor] | None = None

    def run(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Layers first..last-1 on hidden [B, T, d]; the result is what enters layer `last`."""
        for index in range(first, last):
            args, kwargs = self.arguments[index]
            hidden = self._layer(index, hidden, None if self.before is None else self.before[index], args, kwargs)
        return hidden

    def _layer(self, index: int, hidden: Tensor, before: Tensor | None, args: Any, kwargs: Any) -> Tensor:
        whole = hidden if before is None else torch.cat([before, hidden], dim=1)
        out = self.model.layer(index)(whole, *args, **kwargs)
        result: Tensor = (out[0] if isinstance(out, tuple) else out).to(hidden.device)  # layers may be spread
        return result if before is None else result[:, before.shape[1] :]

    def run_rows(self, hidden: Tensor, layer: int, rows: Tensor) -> Tensor:
        """One layer on hidden [n, T, d], whose rows stand where the batch's `rows` [n] do; rows may repeat."""
        size = self.start.shape[0]

        def pick(value: Any) -> Any:
            return _pick_rows(value.only(layer) if isinstance(value, Prefix) else value, rows, size, pick)

        args, kwargs = _pick_arguments(self.arguments[layer], rows, size, pick)
        before = None if self.before is None else self.before[layer][rows]
        return self._layer(layer, hidden, before, args, kwargs)

    def run_with_key(self, hidden: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """One layer on hidden [B, T, d]: its output [B, T, d] and the key, the input of W^l [B, T, f]."""
        with captured_inputs(self.model, [layer]) as keys:
            out = self.run(hidden, layer, layer + 1)
        return out, keys[layer][:, -hidden.shape[1] :]

    def select(self, rows: Tensor) -> Calls:
        """The calls for some of the batch's rows, in the order given by `rows` (indices)."""
        size = self.start.shape[0]
        memo: dict[int, Any] = {}  # every layer shares the same masks and tables: select each of them once

        def pick(value: Any) -> Any:
            if id(value) not in memo:
                memo[id(value)] = _pick_rows(value, rows, size, pick)
            return memo[id(value)]

        arguments = [_pick_arguments(call, rows, size, pick) for call in self.arguments]
        before = None if self.before is None else {layer: states[rows] for layer, states in self.before.items()}
        return Calls(self.model, self.start[rows], arguments, before)

    def behind(self, column: int, states: Sequence[Tensor]) -> Calls:
        """The calls of columns from `column` on, where states[l] [B, T, d] enter each layer on those before it."""
        before = {layer: states[layer][:, :column] for layer in range(self.model.n_layers)}
        return Calls(self.model, self.start[:, column:], self.arguments, before)


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _pick_arguments(call: Call, rows: Tensor, size: int, pick: Callable[[Any], Any]) -> Call:
    """A layer's arguments for some rows. Biases by distance (ALiBi) have no rows of their own, or one a head."""
    args, kwargs = call
    picked: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "alibi" and isinstance(value, Tensor):  # [B · heads, 1, T]
            picked[name] = value.view(size, -1, *value.shape[1:])[rows].flatten(0, 1)
        elif name == "position_embeddings" and isinstance(value, tuple) and value[0].ndim == 4 and size > 1:
            picked[name] = tuple(table[:, rows] for table in value)  # Qwen-VL's: [3, B, T, ·]
        else:
            picked[name] = value if name == "position_bias" else pick(value)  # MPT's: [heads, 1, T]
    return tuple(pick(value) for value in args), picked


def _pick_rows(value: Any, rows: Tensor, size: int, pick: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor):
        # One-dimensional arguments count columns, and a leading 1 is shared by all rows.
        return value[rows] if value.ndim >= 2 and value.shape[0] == size and size > 1 else value
    if isinstance(value, Prefix):
        return value.select(rows)
    if isinstance(value, (tuple, list)):
        return type(value)(pick(item) for item in value)
    return value


def record(model: Model, batch: Batch, cache: DynamicCache | None = None) -> Calls:
    """Let the network's own forward prepare a batch and record how it calls its layers; no layer runs.

    With `cache`, its columns come before the batch's and `batch.mask` covers both.
    """
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    starts: list[Tensor] = []

    def recorder(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if index == 0:
            starts.append(hidden)
        arguments.append((args, kwargs))
        return hidden

    with torch.no_grad(), model.layers_replaced(recorder):
        model.net.base_model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return Calls(model, starts[0], arguments)


def record_suffix(model: Model, batch: Batch, above: int) -> tuple[Calls, Tensor]:
    """Run all that never changes when h^above moves at the aligned column, once; keep what the rest needs.

    Returns the calls of columns from the aligned one on, whose cached prefix serves layers above `above`,
    and the hidden states [B, S, d] that leave layer `above` on those columns.
    """
    with torch.no_grad():
        if batch.column == 0:
            calls = record(model, batch)
            return calls, calls.run(calls.start, 0, above + 1)
        if not model.family.attention_only:  # no keys and values tell a later column what a convolution has seen
            calls = record(model, batch)
            states = [calls.start]
            for index in range(model.n_layers):
                states.append(calls.run(states[-1], index, index + 1))
            return calls.behind(batch.column, states), states[above + 1][:, batch.column :]
        cache = DynamicCache()
        head = record(model, batch.cut(0, batch.column), cache)
        head.run(head.start, 0, model.n_layers)
        prefix = Prefix({i: (cache.layers[i].keys, cache.layers[i].values) for i in range(model.n_layers)})
        calls = _after(record(model, batch.cut(batch.column), cache), prefix)
        hidden = calls.run(calls.start, 0, above + 1)
        for index in range(above + 1):
            prefix.pairs.pop(index, None)  # only layers above are run again
        return calls, hidden


def record_after(model: Model, batch: Batch, pairs: dict[int, tuple[Tensor, Tensor]]) -> Calls:
    """The calls of columns that follow others whose keys and values are known, a pair [B, heads, P, ·] a layer.

    `batch.mask` covers both.
    """
    cache = DynamicCache()
    for layer, (keys, values) in sorted(pairs.items()):
        cache.update(keys, values, layer)  # masks are made from what it holds
    return _after(record(model, batch, cache), Prefix(pairs))


def _after(calls: Calls, prefix: Prefix) -> Calls:
    """The calls with `prefix` where the network's own cache stood."""

    def swap(value: Any) -> Any:
        return prefix if isinstance(value, Cache) else value

    calls.arguments = [
        (tuple(swap(a) for a in args), {k: swap(v) for k, v in kwargs.items()}) for args, kwargs in calls.arguments
    ]
    return calls


@contextmanager
def captured_inputs(model: Model, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, every call of W^l for l in `layers` leaves its input in the dict given: the keys [B, T, f]."""
    keys: dict[int, Tensor] = {}
    shapes: dict[int, torch.Size] = {}
    handles, on = [], model.device
    for index in layers:

        def note_shape(module: nn.Module, inputs: tuple[Tensor, ...], index: int = index) -> None:
            shapes[index] = inputs[0].shape[:-1]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], index: int = index) -> None:
            keys[index] = inputs[0].reshape(*shapes[index], -1).to(on)  # OPT's MLP works on [B*T, d]

        handles.append(model.layer(index).register_forward_pre_hook(note_shape))
        handles.append(model.down(index).register_forward_pre_hook(hook))
    try:
        yield keys
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_to(model: Model, layer: int, batch: Batch, capture: Sequence[int]) -> dict[int, Tensor]:
    """Run layers 0..layer only and return the keys of the layers in `capture`, each [B, T, f].

    Where the last layer's keys are wanted, nothing behind them is run.
    """
    calls = record(model, batch)
    with captured_inputs(model, capture) as keys, suppress(_Enough), _ending_at(model, layer, capture):
        calls.run(calls.start, 0, layer + 1)
    return keys


class _Enough(Exception):
    """All keys that were asked for are there."""


@contextmanager
def _ending_at(model: Model, layer: int, capture: Sequence[int]) -> Iterator[None]:
    """While open, the input of W^layer ends a run, if it is among those captured: the product itself is not needed."""
    if layer not in capture:
        yield
        return

    def end(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Enough

    handle = model.down(layer).register_forward_pre_hook(end)  # behind the hook that keeps the input
    try:
        yield
    finally:
        handle.remove()
