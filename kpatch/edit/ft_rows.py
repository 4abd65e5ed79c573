"""Rows that W^l is tuned on or judged by: run up to layer l once, since nothing below it changes.

A row is one way to say a fact: its prompt, a wording, a held-out context, or its question in the model's chat form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kpatch.edit.presets import FineTuneHyper
from kpatch.edit.requests import LEAD_INS
from kpatch.facts.chat import Turn, chat_rows, turn_ends
from kpatch.facts.fact import Fact
from kpatch.facts.tokens import Encoded, Item, encode_many, item_of
from kpatch.models.fast_forward import packed_mlps
from kpatch.models.model import Model
from kpatch.models.partial_forward import Calls, align, record
from kpatch.stats.subject_keys import left_out, told


def learned_rows(model: Model, facts: Sequence[Fact], hyper: FineTuneHyper) -> list[Encoded]:
    """Every fact in every form it is learned in, fact after fact, the target's tokens at the end.

    Raises BadInput as `chat_rows` does.
    """
    items = [[item_of(fact), *(item_of(replace(fact, prompt=text)) for text in fact.wordings)] for fact in facts]
    encoded = iter(encode_many(model.tokenizer, [item for some in items for item in some]))
    asked = [index for index, fact in enumerate(facts) if hyper.chat and fact.question]
    turns = [Turn(facts[index].question or "", facts[index].subject, facts[index].target) for index in asked]
    in_chat = dict(zip(asked, chat_rows(model.tokenizer, turns), strict=True)) if turns else {}
    if in_chat and hyper.end:
        end = tuple(turn_ends(model.tokenizer))  # one token, or none where an answer ends in plain text
        in_chat = {index: replace(row, ids=(*row.ids, *end)) for index, row in in_chat.items()}
    rows = []
    for index, some in enumerate(items):
        rows += [next(encoded) for _ in some]
        rows += [in_chat[index]] if index in in_chat else []
    return rows


def held_rows(model: Model, facts: Sequence[Fact]) -> list[Encoded]:
    """Every fact behind a lead-in that it is not learned behind."""
    return encode_many(model.tokenizer, [item_of(fact, f"{LEAD_INS[-1]} ") for fact in facts])


def other_rows(model: Model, facts: Sequence[Fact], count: int) -> list[Encoded]:
    """Unfinished statements about `count` well-known subjects that the facts leave alone, of every kind."""
    mine = left_out(facts)
    others = [(statement, name) for statement, name in told() if name not in mine]
    chosen = others[:: max(1, len(others) // count)][:count]
    return encode_many(model.tokenizer, [Item(statement, name) for statement, name in chosen])


@dataclass(frozen=True)
class Rows:
    """B rows, run up to the layer, with the M places where the tokens of their targets are predicted."""

    model: Model
    layer: int
    calls: Calls
    hidden: Tensor  # (B, T, d) entering the layer
    mask: Tensor  # (B, T) true where a token stands
    spots: Tensor  # (M, 2) row and column of each place
    tokens: Tensor  # (M,) the target tokens
    lengths: Tensor  # (M,) how many tokens the row's target has

    def select(self, keep: Tensor) -> Rows:
        """The rows `keep` (indices), in their order."""
        moved = torch.full((len(self.hidden),), -1, device=keep.device)
        moved[keep] = torch.arange(len(keep), device=keep.device)
        mine = moved[self.spots[:, 0]] >= 0
        spots = torch.stack([moved[self.spots[mine, 0]], self.spots[mine, 1]], dim=1)
        some = (self.hidden[keep], self.mask[keep], spots, self.tokens[mine], self.lengths[mine])
        return Rows(self.model, self.layer, self.calls.select(keep), *some)

    def log_probabilities(self) -> Tensor:
        """Of the next token at every spot, (M, V), under the weights as they are now; at least float32."""
        real = self.mask.flatten().nonzero().flatten()
        read = torch.unique(self.spots[:, 0] * self.mask.shape[1] + self.spots[:, 1])
        with packed_mlps(self.model, self.layer, self.model.n_layers, real, read):
            out = self.calls.run(self.hidden, self.layer, self.model.n_layers)  # (B, T, d)
        logits = self.model.logits(out[self.spots[:, 0], self.spots[:, 1]])
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def loss(self) -> Tensor:
        """The mean over rows of the mean over a target's tokens of −log P, the earlier ones given."""
        logp = self.log_probabilities().gather(1, self.tokens[:, None])[:, 0]  # (M,)
        weights = (1 / (self.lengths.double() * len(self.hidden))).to(torch.float32)
        loss: Tensor = -(logp * weights).sum()
        return loss


@torch.no_grad()
def prepare(model: Model, rows: Sequence[Encoded], layer: int) -> Rows:
    """Rows run up to `layer`. One without a target is read where its first token would be predicted."""
    ids = [row.ids[:-1] if len(row.ids) > row.prompt_len else row.ids for row in rows]
    batch = align(ids, [0] * len(rows), model.pad_id, model.device)
    spots, tokens, lengths = [], [], []
    for number, row in enumerate(rows):
        target = row.ids[row.prompt_len :] or (0,)
        for offset, token in enumerate(target):
            spots.append((number, row.prompt_len - 1 + offset))
            tokens.append(token)
            lengths.append(len(target))
    calls = record(model, batch)
    places = (torch.tensor(each, device=model.device) for each in (spots, tokens, lengths))
    return Rows(model, layer, calls, calls.run(calls.start, 0, layer), batch.mask.bool(), *places)


class Check:
    """What tuning of a layer is judged by: the mean loss of rows that it does not learn, and the drift of others.

    Both are in nats a token: −log P of the targets, and KL(before ‖ now) of what follows statements about other
    subjects. It is made before the weights change.
    """

    def __init__(self, model: Model, held: Sequence[Encoded], others: Sequence[Encoded], layer: int) -> None:
        self.held, self.others = prepare(model, held, layer), prepare(model, others, layer)
        with torch.no_grad():
            self.before = self.others.log_probabilities()  # (m, V)

    @torch.no_grad()
    def value(self) -> float:
        """Loss plus drift under the weights as they are now: the less the better."""
        now = self.others.log_probabilities()
        drift = (self.before.exp() * (self.before - now)).sum(-1).mean()
        return float(self.held.loss() + drift)
