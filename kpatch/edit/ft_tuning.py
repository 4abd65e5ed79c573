"""The tuning itself: Adam on one weight, pass after pass over rows, until they are learned or validation says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kpatch.edit.ft_rows import Check, Rows, prepare
from kpatch.edit.presets import FineTuneHyper
from kpatch.edit.weights import restored
from kpatch.facts.tokens import Encoded
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

_CHUNK = 256  # rows that are padded to one width, and shuffled among themselves
_PATIENCE = 3  # passes in a row that may be worse than the best one


@dataclass(frozen=True)
class Tuned:
    """W − W0 as W is stored, the mean loss of every pass, and its value on held-out rows, if those were asked.

    `best` is the pass that counts, from 1: the one of the least value, or the last.
    """

    change: Tensor
    losses: tuple[float, ...]
    values: tuple[float, ...]
    best: int


def tune(
    model: Model,
    rows: Sequence[Encoded],
    hyper: FineTuneHyper,
    seed: int = 0,
    check: Check | None = None,
    report: Reporter = SILENT,
) -> Tuned:
    """Tune W of the layer on the rows; the model is left as it was.

    The loss of a row is the mean over its target's tokens of −log P, the earlier ones given. Adam works on a copy in
    float32 where the model's own numbers are narrower. `check` judges every pass.
    """
    name = model.weight_name(hyper.layer)
    stored = model.numbers(name)
    base = stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True)
    master = base.clone().requires_grad_()
    adam = torch.optim.Adam([master], lr=hyper.learning_rate)
    losses: list[float] = []
    values: list[float] = []
    best, kept = 0, base
    with (
        restored(model, [name]),
        report.task("Fine-tuning", hyper.steps * len(rows), "row") as advance,
    ):
        weight = model.weight(hyper.layer)
        batch_of = _batches(model, rows, hyper, seed)
        every_pass = passes(len(rows), hyper, seed)
        weight.requires_grad_()
        try:
            for number in range(1, hyper.steps + 1):
                total = 0.0
                for members in next(every_pass):
                    loss = batch_of(members).loss()
                    found = loss.item()
                    total += found * len(members)
                    advance(len(members))
                    if found < hyper.stop_loss:
                        continue
                    (gradient,) = torch.autograd.grad(loss, [weight])
                    master.grad = gradient.to(base.dtype) + hyper.weight_decay * (master.detach() - base)
                    adam.step()
                    with torch.no_grad():
                        weight.copy_(master)
                losses.append(total / len(rows))
                if check is not None:
                    values.append(check.value())
                if check is None or values[-1] == min(values):
                    best, kept = number, master.detach().clone()
                if losses[-1] < hyper.stop_loss or number - best >= _PATIENCE:
                    break
        finally:
            weight.requires_grad_(False)
    return Tuned((kept - base).cpu(), tuple(losses), tuple(values), best)


def passes(count: int, hyper: FineTuneHyper, seed: int) -> Iterator[list[list[int]]]:
    """The batches of every pass, as positions of rows: always the same ones, or drawn anew from `seed`."""
    if not hyper.shuffle:
        while True:
            yield [list(range(begin, min(begin + hyper.batch, count))) for begin in range(0, count, hyper.batch)]
    generator = torch.Generator().manual_seed(seed)
    chunks = _chunks(count, seed)
    while True:
        drawn: list[list[int]] = []
        for at in torch.randperm(len(chunks), generator=generator).tolist():
            mixed = chunks[at][torch.randperm(len(chunks[at]), generator=generator)]
            drawn += [some.tolist() for some in torch.split(mixed, hyper.batch)]
        yield drawn


def _chunks(count: int, seed: int) -> tuple[Tensor, ...]:
    """Positions of rows that are prepared together."""
    return torch.split(torch.randperm(count, generator=torch.Generator().manual_seed(seed)), _CHUNK)


def _batches(
    model: Model, rows: Sequence[Encoded], hyper: FineTuneHyper, seed: int
) -> Callable[[Sequence[int]], Rows]:
    """Rows by their positions, each run up to the layer once."""
    if not hyper.shuffle:
        fixed = cache(lambda members: prepare(model, [rows[index] for index in members], hyper.layer))
        return lambda members: fixed(tuple(members))
    chunks = _chunks(len(rows), seed)
    prepared = [prepare(model, [rows[index] for index in chunk.tolist()], hyper.layer) for chunk in chunks]
    places = {index: (at, place) for at, chunk in enumerate(chunks) for place, index in enumerate(chunk.tolist())}

    def drawn(members: Sequence[int]) -> Rows:
        at = places[members[0]][0]
        keep = torch.tensor([places[index][1] for index in members], device=model.device)
        return prepared[at].select(keep)

    return drawn
