"""Refinement: the residuals are corrected for what the written weights do, to the facts and to everything else.

Joint writes find what should be added at each subject by itself. What is written is something else: the ridge gives
a fact a share of its residual, other facts' writes reach its key, and all of them together reach text and other
subjects. Here the network is run with Δ^l = R^l H^l in place at every token. H^l [r, f], which says where a write
goes, stays as the update gave it; the residuals R^l [d, r], which say what is written, take some steps of Adam along

    mean over groups of [max(nll_i − stop_loss, 0) + kl · drift_i]  +  hold · Σ over kinds of KL(before ‖ with Δ)

from a smaller patch than the update's, so that a residual grows back only where a fact needs it. The kinds are those
of `kpatch.edit.bystanders`. A fact that is met has no gradient.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kpatch.edit.bystanders import Bystander, Bystanders, answer
from kpatch.edit.problem import Running, adam, log_probabilities, prepare
from kpatch.edit.requests import Group, in_batches
from kpatch.edit.values_cache import column_bytes, plan
from kpatch.models.fast_forward import few_columns_attention
from kpatch.models.mixed_precision import mixed_precision
from kpatch.models.model import Model
from kpatch.models.partial_forward import align
from kpatch.patch.delta import Delta, Dense, LowRank
from kpatch.reporter import SILENT, Reporter

_BEGIN = 0.7  # the share of the update that is begun with
_RATE = 0.06  # the longest step of a coordinate, against the root mean square of the residuals of its layer
_RISE = 5  # steps until the longest
_SEEN = 3  # how often each group is looked at, where there are many
_AT_ONCE = 8  # groups a step at least
_WIDER = 1.5  # bystanders of one batch differ in width by this factor at most


@dataclass(frozen=True)
class Goal:
    """How far residuals are refined: so many steps, the loss at which a fact is met, the weights of drift and hold."""

    steps: int
    stop_loss: float
    kl: float
    hold: float


def refine(
    model: Model,
    groups: Sequence[Group],
    deltas: Mapping[str, Delta],
    others: Bystanders,
    goal: Goal,
    *,
    seed: int,
    budget: int,
    report: Reporter = SILENT,
) -> dict[str, Delta]:
    """The deltas with other residuals, in the form and order in which they came; the model is left as it was found.

    `deltas` are not in the model. Every step looks at some of the groups, each of them equally often, and at rows
    drawn from `others`. `budget` bounds what a batch takes, in bytes. Deterministic in the seed.
    """
    written = _Written(model, deltas, _BEGIN)
    above = min(written.layers) - 1
    first = {name: torch.zeros_like(left) for name, left in written.left.items()}
    second = {name: torch.zeros_like(left) for name, left in written.left.items()}
    sizes = {name: float(left.detach().square().mean().sqrt()) for name, left in written.left.items()}
    turns = _turns(len(groups), goal.steps, seed)
    with (
        written.open(),
        few_columns_attention(model),
        mixed_precision(model),
        report.task("Refining", goal.steps, "step") as done,
    ):
        for step, numbers in enumerate(turns, 1):
            some = [groups[number] for number in numbers]
            rows_only = [replace(group, drifts=()) for group in some]
            for batch in plan(model, rows_only, above + 1, budget):
                _facts(model, [rows_only[place] for place in batch], len(some), above, goal.stop_loss)
            drawn = others.draw([(number, groups[number]) for number in numbers]) if goal.hold else []
            weighed = [one for rows in drawn for one in _weighed(rows, goal.hold)]
            weighed += _weighed([answer(row) for group in some for row in group.drifts], goal.kl)
            for rows in _batches(model, weighed, above, budget):
                _drift(model, rows, written, above).backward()  # type: ignore[no-untyped-call]
            pace = _RATE * min(1.0, step / _RISE) * min(1.0, 2 * (1 - (step - 1) / goal.steps))
            with torch.no_grad():
                for name, left in written.left.items():
                    if left.grad is None:
                        continue
                    first[name], second[name], mean, scale = adam(first[name], second[name], left.grad, step)
                    left -= pace * sizes[name] * mean / scale
                    left.grad = None
            done(1)
    return written.deltas()


def looked_at(count: int, steps: int) -> int:
    """How many of `count` groups each of so many steps looks at."""
    return min(count, max(_AT_ONCE, -(-_SEEN * count // max(1, steps))))


def _turns(count: int, steps: int, seed: int) -> list[list[int]]:
    """Which of `count` groups each step looks at: all equally often, in an order drawn anew each time."""
    draws = random.Random(seed)
    size = looked_at(count, steps)
    waiting: list[int] = []
    turns = []
    for _ in range(steps):
        turn, waiting = waiting[:size], waiting[size:]
        if len(turn) < size:  # nothing waits: all of them once more
            anew, here = draws.sample(range(count), count), set(turn)
            more = [number for number in anew if number not in here][: size - len(turn)]
            turn, taken = turn + more, set(more)
            waiting = [number for number in anew if number not in taken]
        turns.append(turn)
    return turns


class _Written:
    """Deltas while they are refined: a share of their residuals, as variables, and hooks that put them in place."""

    def __init__(self, model: Model, deltas: Mapping[str, Delta], share: float = 1.0) -> None:
        self.model, self.before = model, dict(deltas)
        places = {model.weight_name(index): index for index in model.editable}
        self.layers = {places[name]: name for name in deltas}
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}
        self.off = False
        for name, delta in deltas.items():
            factors = _factors(delta.transposed() if model.stores_transposed else delta)
            factors = factors.to(model.device, torch.float32)
            self.left[name] = (share * factors.left).requires_grad_()
            self.right[name] = factors.right

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, the network runs as if the deltas were written, but for what is `without` them."""
        with ExitStack() as stack:
            for layer, name in self.layers.items():

                def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor, name: str = name) -> Tensor:
                    if self.off:
                        return out
                    left, right = self.left[name].to(out.device), self.right[name].to(out.device)
                    added: Tensor = (inputs[0].to(right.dtype) @ right.T) @ left.T
                    return out + added.to(out.dtype)

                stack.callback(self.model.down(layer).register_forward_hook(hook).remove)
            yield

    @contextmanager
    def without(self) -> Iterator[None]:
        """While open, the network runs as it is."""
        self.off = True
        try:
            yield
        finally:
            self.off = False

    def deltas(self) -> dict[str, Delta]:
        """Each delta in the form in which it came."""
        found: dict[str, Delta] = {}
        for name, before in self.before.items():
            new = LowRank(self.left[name].detach().cpu(), self.right[name].cpu())
            new = new.transposed() if self.model.stores_transposed else new
            if isinstance(before, Dense):
                found[name] = Dense(new.dense(torch.float32), before.known_rank)
            else:
                found[name] = LowRank(new.left.contiguous(), new.right.contiguous())
        return found


def _factors(delta: Delta) -> LowRank:
    """What is refined, left, and what stays, right: of a dense delta its singular vectors."""
    if isinstance(delta, LowRank):
        return delta
    u, s, vh = torch.linalg.svd(delta.dense(), full_matrices=False)
    return LowRank(u * s, vh)


def _facts(model: Model, groups: Sequence[Group], count: int, above: int, stop_loss: float) -> None:
    """Add the gradient of what these groups still miss; `count` groups are looked at in this step."""
    problem = prepare(model, groups, above)  # what stands before the subject is run with Δ too, without a gradient
    nll = torch.zeros(len(groups), device=model.device)
    for rows in problem.parts:
        nll = nll + rows.losses(log_probabilities(model, rows, rows.hidden, rows.read, above))[0]
    missing = (nll - stop_loss).relu().sum() / count
    missing.backward()  # type: ignore[no-untyped-call]


_Weighed = tuple[Bystander, float]  # a row, and what each token that it holds weighs


def _weighed(rows: Sequence[Bystander], weight: float) -> list[_Weighed]:
    """Rows of one kind, which weigh `weight` together: each of their tokens alike."""
    held = sum(len(row.read) for row in rows)
    return [(row, weight / held) for row in rows]


def _batches(model: Model, drawn: Sequence[_Weighed], above: int, budget: int) -> list[list[_Weighed]]:
    """Rows that run together, within the budget."""
    layers, vocabulary = model.n_layers - above - 1, int(model.config.vocab_size)

    def width(one: _Weighed) -> int:
        return len(one[0].ids) - one[0].begin

    def need(one: _Weighed) -> int:
        return column_bytes(model, width(one), one[0].begin, layers) + len(one[0].read) * vocabulary * 4 * 5

    return [[drawn[place] for place in batch] for batch in in_batches(drawn, width, need, budget, _WIDER)]


def _drift(model: Model, rows: Sequence[_Weighed], written: _Written, above: int) -> Tensor:
    """Σ of weight · KL(before ‖ with Δ) over the tokens that these rows hold, whose batch has a gradient for Δ."""
    device = model.device
    read = [(number, column - row.begin, weight) for number, (row, weight) in enumerate(rows) for column in row.read]
    spots = torch.tensor([(number, column) for number, column, _ in read], device=device)
    weights = torch.tensor([weight for *_, weight in read], device=device)
    batch = align([row.ids for row, _ in rows], [row.begin for row, _ in rows], model.pad_id, device)
    with written.without(), torch.no_grad():
        running = Running.of(model, batch, above)
        before = log_probabilities(model, running, running.hidden, spots, above)  # (M, V)
    running = Running.of(model, batch, above)
    now = log_probabilities(model, running, running.hidden, spots, above)
    moved: Tensor = (before.exp() * (before - now)).sum(-1) @ weights
    return moved
