"""FT-W: fine-tuning of one MLP output projection on the facts, held near where it was. A baseline.

Source: Meng et al. 2023 (MEMIT), section 5 (FT-W): Adam on one layer, early stopping, weight decay. The decay pulls
towards the weights as they were: it is what keeps the model, and what a patch carries is the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.edit.methods import Edit, Inputs, Method
from kpatch.edit.presets import PRESETS, FineTuneHyper
from kpatch.edit.weights import restored
from kpatch.facts.fact import Fact
from kpatch.facts.tokens import encode_many, item_of
from kpatch.models.fast_forward import packed_mlps
from kpatch.models.model import Model
from kpatch.models.partial_forward import Calls, align, record
from kpatch.patch.delta import Delta, Dense, LowRank
from kpatch.reporter import SILENT, Reporter

_SAME = 1e-6  # singular values below this share of the largest are rounding


class FineTune(Method):
    """FT-W of one layer."""

    name = "ft"
    hyper = FineTuneHyper
    presets = PRESETS["ft"]
    one_layer = True

    def edit(self, model: Model, facts: Sequence[Fact], hyper: FineTuneHyper, inputs: Inputs) -> Edit:
        """Tune W^l; no keys or values, so the facts can't be solved again."""
        with inputs.timed("update"):
            change = tune(model, facts, hyper, inputs.report)[0]
            return Edit({model.weight_name(hyper.layer): stored_small(change)}, hyper.layers)


@dataclass
class _Batch:
    """Some facts' rows, run up to the layer once, with the places where their target tokens are predicted."""

    calls: Calls
    hidden: Tensor  # (B, T, d) entering the layer
    real: Tensor  # flat indices of tokens
    read: Tensor  # flat indices where logits are wanted
    tokens: Tensor  # (M,) the target tokens
    weights: Tensor  # (M,) so that the sum is the mean over facts of their mean over tokens
    spots: Tensor  # (M, 2) row and column of each


def tune(
    model: Model, facts: Sequence[Fact], hyper: FineTuneHyper, report: Reporter = SILENT
) -> tuple[Tensor, tuple[float, ...]]:
    """W − W0 [as W is stored] after tuning, and the mean loss of every pass; the model is left as it was.

    The loss of a fact is the mean over its target's tokens of −log P, the earlier ones given. Adam works on a copy in
    float32 where the model's own numbers are narrower.
    """
    weight = model.weight(hyper.layer)
    base = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    master = base.clone().requires_grad_()
    adam = torch.optim.Adam([master], lr=hyper.learning_rate)
    losses: list[float] = []
    with (
        restored(model, [model.weight_name(hyper.layer)]),
        report.task("Fine-tuning", hyper.steps * len(facts), "fact") as advance,
    ):
        batches = [
            _prepare(model, facts[begin : begin + hyper.batch], hyper.layer)
            for begin in range(0, len(facts), hyper.batch)
        ]
        weight.requires_grad_()
        try:
            for _ in range(hyper.steps):
                total = 0.0
                for batch in batches:
                    loss = _loss(model, batch, hyper.layer)
                    found = loss.item()
                    total += found * len(batch.hidden)
                    advance(len(batch.hidden))
                    if found < hyper.stop_loss:
                        continue
                    (gradient,) = torch.autograd.grad(loss, [weight])
                    master.grad = gradient.to(base.dtype) + hyper.weight_decay * (master.detach() - base)
                    adam.step()
                    with torch.no_grad():
                        weight.copy_(master)
                losses.append(total / len(facts))
                if losses[-1] < hyper.stop_loss:
                    break
        finally:
            weight.requires_grad_(False)
    return (master.detach() - base).cpu(), tuple(losses)


@torch.no_grad()
def _prepare(model: Model, facts: Sequence[Fact], layer: int) -> _Batch:
    rows = encode_many(model.tokenizer, [item_of(fact) for fact in facts])
    batch = align([row.ids[:-1] for row in rows], [0] * len(rows), model.pad_id, model.device)
    spots, tokens, weights = [], [], []
    for number, row in enumerate(rows):
        target = row.ids[row.prompt_len :]
        for offset, token in enumerate(target):
            spots.append((number, row.prompt_len - 1 + offset))
            tokens.append(token)
            weights.append(1 / (len(target) * len(rows)))
    calls = record(model, batch)
    places = torch.tensor(spots, device=model.device)
    return _Batch(
        calls,
        calls.run(calls.start, 0, layer),
        batch.mask.flatten().nonzero().flatten(),
        torch.unique(places[:, 0] * batch.ids.shape[1] + places[:, 1]),
        torch.tensor(tokens, device=model.device),
        torch.tensor(weights, device=model.device),
        places,
    )


def _loss(model: Model, batch: _Batch, layer: int) -> Tensor:
    with packed_mlps(model, layer, model.n_layers, batch.real, batch.read):
        out = batch.calls.run(batch.hidden, layer, model.n_layers)  # (B, T, d)
    logits = model.logits(out[batch.spots[:, 0], batch.spots[:, 1]])  # (M, V)
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    logp = logp.gather(1, batch.tokens[:, None])[:, 0]  # (M,)
    loss: Tensor = -(logp * batch.weights).sum()
    return loss


def stored_small(change: Tensor) -> Delta:
    """A change [rows, cols] as factors where its rank lets them be smaller, else as it is.

    Adam divides every entry's step by its own size, so the rank is full as a rule.
    """
    rows, cols = change.shape
    wide = change.double()
    small = wide @ wide.T if rows <= cols else wide.T @ wide
    values = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()  # singular values, rising
    rank = max(1, int((values > _SAME * values[-1]).sum()))
    if rank * (rows + cols) >= rows * cols:
        return Dense(change.float(), None)
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float())
