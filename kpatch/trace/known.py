"""Which facts a model knows: those whose object it predicts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kpatch.errors import BadInput, CheckFailed
from kpatch.facts.fact import Fact
from kpatch.facts.tokens import encode_spans, encode_target, name_of
from kpatch.models.model import Model
from kpatch.models.partial_forward import align, record
from kpatch.reporter import SILENT, Reporter
from kpatch.trace.cells import Traced
from kpatch.trace.fact_lists import slotted

_BATCH = 128  # prompts asked at once


@dataclass(frozen=True)
class Known:
    """A fact whose object the model predicts: `answer` is that object, `item` what is traced."""

    fact: Fact
    answer: str
    item: Traced


@dataclass(frozen=True)
class Selection:
    """Facts that the model knows, out of how many that were tried."""

    known: tuple[Known, ...]
    tried: int


def find_known(
    model: Model, facts: Sequence[Fact], limit: int | None = None, seed: int = 0, report: Reporter = SILENT
) -> Selection:
    """The facts whose object's first token is the model's first choice, in an order drawn from `seed`.

    At most `limit` of them; facts behind the last one kept are not tried. A fact with `was`, the object before an
    edit, counts when the model predicts either. Raises CheckFailed where none is known.
    """
    order = list(range(len(facts)))
    random.Random(seed).shuffle(order)
    kept: list[Known] = []
    tried = 0
    with report.task("Asking for facts", len(order) if limit is None else None, "fact") as advance:
        for begin in range(0, len(order), _BATCH):
            batch = [facts[index] for index in order[begin : begin + _BATCH]]
            for found in _ask(model, batch):
                if limit is None or len(kept) < limit:
                    tried += 1
                    kept += [found] if found else []
            advance(len(batch))
            if limit is not None and len(kept) >= limit:
                break
    if not kept:
        raise CheckFailed(
            f"{model.name} predicts none of the {tried:,} facts correctly, so there is nothing to trace",
            details=["a fact counts when its object's first token is the model's first choice"],
            hint="give facts that it knows in `facts`; `kpatch ask` shows what it answers",
        )
    return Selection(tuple(kept), tried)


def ask_one(model: Model, prompt: str, subject: str) -> Known:
    """One prompt, traced for what the model itself answers. Raises BadInput for a subject that it does not hold."""
    fact = Fact(subject.strip(), slotted(prompt, subject), "?")
    row, first = _rows(model, [fact])[0]
    answer = _first_choices(model, [row])[0]
    text = model.tokenizer.decode([answer]).strip()
    return Known(Fact(fact.subject, fact.prompt, text or "?"), text, Traced(row[0], first, row[1], answer))


_Row = tuple[tuple[int, ...], int]  # ids, the subject's last token


def _rows(model: Model, facts: Sequence[Fact]) -> list[tuple[_Row, int]]:
    """Each prompt's ids with its subject's last and first token. Raises BadInput for one that is too long."""
    longest = getattr(model.config, "max_position_embeddings", None)
    rows = []
    for fact, (row, first, _) in zip(
        facts, encode_spans(model.tokenizer, [(fact.prompt, fact.subject, None, "") for fact in facts]), strict=True
    ):
        if longest and len(row.ids) > longest:
            raise BadInput(
                f"{name_of(fact)} is too long for {model.name}",
                details=[f"expected at most {longest} tokens", f"found {len(row.ids)}"],
            )
        rows.append(((row.ids, row.subject_last), first))
    return rows


def subject_items(model: Model, facts: Sequence[Fact]) -> list[Traced]:
    """Facts as tokens without an answer: what noise is measured on."""
    return [Traced(ids, first, last, -1) for (ids, last), first in _rows(model, facts)]


def _ask(model: Model, facts: Sequence[Fact]) -> list[Known | None]:
    rows = _rows(model, facts)
    found: list[Known | None] = []
    for fact, (row, first), choice in zip(facts, rows, _first_choices(model, [row for row, _ in rows]), strict=True):
        answers = [target for target in (fact.target, fact.was) if target]
        right = [
            text for text in answers if encode_target(model.tokenizer, fact.text(), text, fact.space)[0] == choice
        ]
        found.append(Known(fact, right[0], Traced(row[0], first, row[1], choice)) if right else None)
    return found


@torch.no_grad()
def _first_choices(model: Model, rows: Sequence[_Row]) -> list[int]:
    """The likeliest next token after each row. Raises CheckFailed for NaN."""
    batch = align([ids for ids, _ in rows], [len(ids) - 1 for ids, _ in rows], model.pad_id, model.device)
    calls = record(model, batch)
    logits = model.logits(calls.run(calls.start, 0, model.n_layers)[:, -1])  # [B, V]
    if not torch.isfinite(logits).all():
        raise CheckFailed(f"{model.name} gives NaN instead of probabilities", hint="try `dtype=float32`")
    choices: list[int] = logits.argmax(-1).tolist()
    return choices


def tokens_of(model: Model, item: Traced) -> list[str]:
    """The prompt's tokens as text, for labels."""
    special: Any = model.tokenizer.all_special_ids
    return [
        model.tokenizer.convert_ids_to_tokens(token) if token in special else model.tokenizer.decode([token])
        for token in item.ids
    ]
