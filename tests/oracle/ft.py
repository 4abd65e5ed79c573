"""Fine-tuning written the plain way: every fact through the whole network, the change itself as the parameter.

Adam's own weight decay on W − W0 is the decay towards the weights as they were. Nothing here uses kpatch.edit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call

from kpatch.facts.tokens import encode
from kpatch.models.model import Model
from tests.oracle.memit import Prompt

if TYPE_CHECKING:
    from kpatch.edit.presets import FineTuneHyper


def loss_of(model: Model, name: str, weight: Tensor, fact: Prompt) -> Tensor:
    """The mean over the target's tokens of −log P, with `weight` in the place of the model's own."""
    row = encode(model.tokenizer, *fact)
    out = functional_call(model.net, {name: weight}, kwargs={"input_ids": torch.tensor([row.ids]), "use_cache": False})
    log_p = out.logits[0].log_softmax(-1)
    target = row.ids[row.prompt_len :]
    total: Tensor = -sum(log_p[row.prompt_len - 1 + offset, token] for offset, token in enumerate(target))
    return total / len(target)


def tune(
    model: Model,
    facts: Sequence[Prompt],
    hyper: FineTuneHyper,
    orders: Iterable[Sequence[Sequence[int]]] | None = None,
) -> tuple[Tensor, list[float]]:
    """W − W0 in the orientation in which W is stored, and the mean loss of every pass.

    `orders` has the batches of every pass, as positions of facts; without them, the facts as they come.
    """
    every_pass = iter(orders) if orders is not None else None
    name = model.weight_name(hyper.layer)
    base = model.weight(hyper.layer).detach()
    change = torch.zeros_like(base).requires_grad_()
    adam = torch.optim.Adam([change], lr=hyper.learning_rate, weight_decay=hyper.weight_decay)
    losses: list[float] = []
    for _ in range(hyper.steps):
        total = 0.0
        plain = [range(len(facts))[begin : begin + hyper.batch] for begin in range(0, len(facts), hyper.batch)]
        for members in plain if every_pass is None else next(every_pass):
            some = [facts[index] for index in members]
            adam.zero_grad()
            loss = sum(loss_of(model, name, base + change, fact) for fact in some) / len(some)
            total += loss.item() * len(some)
            if loss.item() >= hyper.stop_loss:
                loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
        losses.append(total / len(facts))
        if losses[-1] < hyper.stop_loss:
            break
    return change.detach(), losses
