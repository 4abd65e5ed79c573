"""The clean run and the corrupted runs of some facts, with everything in them that cells take values from.

Dimension letters: F facts, S samples, R = F · (1 + S) rows, T tokens, L layers, d width, e width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from kpatch.models.fast_forward import can_pack_mlps
from kpatch.models.model import Model
from kpatch.models.partial_forward import Batch, Calls, align, record, record_after
from kpatch.trace.cells import Site, Traced


@dataclass
class Runs:
    """Rows 0..F-1 are clean, then come S corrupted rows a fact. Prompts end in one column, padded in front.

    values[site][l] [R, T, d]; entering[l] [R, T, d] enters layer l, the last leaves the stack; pairs[l]: keys and
    values [R, ·, T, ·]. bare_mlps[l]: whether what the module around W^l puts out is m^l, no norm or sum of it.
    """

    model: Model
    items: Sequence[Traced]
    samples: int
    batch: Batch
    entering: list[Tensor]
    values: dict[Site, list[Tensor]]
    pairs: dict[int, tuple[Tensor, Tensor]]
    bare_mlps: list[bool]

    @property
    def width(self) -> int:
        """T, columns of the batch."""
        return int(self.batch.ids.shape[1])

    def corrupted(self, fact: int) -> range:
        """The corrupted rows of a fact."""
        begin = len(self.items) + fact * self.samples
        return range(begin, begin + self.samples)

    @cached_property
    def answers(self) -> Tensor:
        """The answer's id of every row, (R,)."""
        ids = [item.answer for item in self.items]
        ids += [item.answer for item in self.items for _ in range(self.samples)]
        return torch.tensor(ids, device=self.model.device)

    @cached_property
    def probabilities(self) -> Tensor:
        """P[answer] of every row as it is, (R,) float64 on the CPU."""
        return read(self.model, self.entering[-1][:, -1], self.answers)

    def suffix(self, columns: int) -> Calls:
        """How the layers are called for the last `columns` columns of every row, the ones before them kept."""
        begin = self.width - columns
        if begin == 0:
            return record(self.model, self.batch)
        if not self.model.family.attention_only:
            return record(self.model, self.batch).behind(begin, self.entering)
        before = {layer: (k[:, :, :begin], v[:, :, :begin]) for layer, (k, v) in self.pairs.items()}
        return record_after(self.model, self.batch.cut(begin), before)


@torch.no_grad()
def run_clean_and_corrupted(model: Model, items: Sequence[Traced], noise: Sequence[Tensor]) -> Runs:
    """Run `items` cleanly and with `noise` on their subjects' embeddings; noise[f] is [S, subject tokens, e]."""
    samples = len(noise[0])
    rows = [item.ids for item in items]
    rows += [item.ids for item in items for _ in range(samples)]
    batch = align(rows, [len(row) - 1 for row in rows], model.pad_id, model.device)
    width = batch.ids.shape[1]

    spots: list[tuple[int, int]] = []  # row and column of every noised token, in the order of the noise
    for number, item in enumerate(items):
        shift = width - len(item.ids)
        begin = len(items) + number * samples
        spots += [(begin + s, shift + t) for s in range(samples) for t in range(item.first, item.last + 1)]
    added = torch.cat([part.flatten(0, 1) for part in noise]).to(model.device)  # (spots, e)
    where = torch.tensor(spots, device=model.device)

    cache = DynamicCache() if model.family.attention_only else None
    with embeddings_moved(model, where[:, 0], where[:, 1], added):
        calls = record(model, batch, cache)
    entering = [calls.start]
    values: dict[Site, list[Tensor]] = {"attn": [], "mlp": []}
    bare = [False] * model.n_layers
    with _kept_outputs(model, batch.ids.shape, values), _compared_mlps(model, values["mlp"], bare):
        for layer in range(model.n_layers):
            entering.append(calls.run(entering[-1], layer, layer + 1))
    values["state"] = entering[1:]
    pairs = {i: (layer.keys, layer.values) for i, layer in enumerate(cache.layers if cache is not None else [])}
    return Runs(model, items, samples, batch, entering, values, pairs, bare)


@contextmanager
def embeddings_moved(model: Model, rows: Tensor, columns: Tensor, added: Tensor) -> Iterator[None]:
    """While open, what the word embedding puts out has `added` [m, e] added at (rows, columns) [m].

    It is the paper's place for noise: before positions are added (GPT-2, OPT) and before a projection (OPT). Where the
    embedding module itself scales what it looks up (Gemma), its output is the scaled vector.
    """

    def hook(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        moved = out.clone()
        moved[rows.to(out.device), columns.to(out.device)] += added.to(out)
        return moved

    handle = model.net.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _kept_outputs(model: Model, shape: Sequence[int], into: dict[Site, list[Tensor]]) -> Iterator[None]:
    """While open, every layer's m^l and a^l are added to the lists of `into`, each [*shape, d]."""

    def keep(kept: list[Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out  # Llama 4's experts say where they sent the tokens
            kept.append(
                out.reshape(*shape, out.shape[-1]).clone().to(model.device)
            )  # Falcon adds attention's output in place

        return hook

    handles = []
    for layer in range(model.n_layers):
        handles.append(model.attn_out(layer).register_forward_hook(keep(into["attn"])))
        handles.append(model.mlp_out(layer).register_forward_hook(keep(into["mlp"])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _compared_mlps(model: Model, kept: list[Tensor], bare: list[bool]) -> Iterator[None]:
    """While open, bare[l] becomes true where the module around W^l puts out the m^l that is in `kept`."""
    handles = []
    for layer in model.editable if can_pack_mlps(model) else ():

        def hook(module: nn.Module, inputs: Any, out: Any, layer: int = layer) -> None:
            known = isinstance(out, Tensor) and len(kept) > layer  # a norm behind the MLP has not run yet
            bare[layer] = known and torch.equal(out.reshape(kept[layer].shape), kept[layer])

        handles.append(model.mlp(layer).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_LOGITS = 1 << 25  # numbers of one piece of logits: 128 MB in float32


def read(model: Model, hidden: Tensor, answers: Tensor) -> Tensor:
    """P[answer] after the last layer: hidden [n, d], answers [n] → [n] float64 on the CPU."""
    found = []
    step = max(1, _LOGITS // int(model.net.get_output_embeddings().weight.shape[0]))
    for begin in range(0, len(hidden), step):
        logits = model.logits(hidden[begin : begin + step]).float()  # [n, V]
        surprise = cross_entropy(logits, answers[begin : begin + step], reduction="none")  # one pass, unlike logsumexp
        found.append((-surprise).cpu().double().exp())
    return torch.cat(found)
