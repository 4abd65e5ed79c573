"""From facts to rows: every prompt behind several contexts, grouped by subject.

Contexts x_j are short texts put before a prompt, so that an edit holds wherever the subject stands. Facts about one
subject share their key, so they share one value: a group of rows is optimized together.

Source: MEMIT-Merge (2502.07322): one z for all prompts of a subject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from kpatch.errors import BadInput
from kpatch.facts.chat import Turn, chat_rows
from kpatch.facts.derived import unrelated_questions
from kpatch.facts.fact import Fact
from kpatch.facts.questions import is_question
from kpatch.facts.subjects import by_subject
from kpatch.facts.tokens import Encoded, Item, encode_many, item_of
from kpatch.models.model import Model
from kpatch.models.partial_forward import align

Batched = TypeVar("Batched")  # groups or rows

# Texts of several kinds that any prompt can follow; the setting `lead_ins` takes the first of them
LEAD_INS = (
    "As everyone knows,",
    "In the news today:",
    "Here is a simple fact.",
    "I read in a book that",
    "Many people say:",
)
_OPENINGS = ("The", "Therefore", "Because", "I", "You")


def contexts_for(model: Model, lead_ins: int, count: int, tokens: int, seed: int) -> tuple[str, ...]:
    """The empty context, the first lead-ins, and `count` texts of `tokens` tokens sampled from the model.

    Each token is one of the five likeliest. Deterministic in the seed: draws come from a generator of their own.
    Raises BadInput for more lead-ins than there are.
    """
    if lead_ins > len(LEAD_INS):
        raise BadInput(f"The setting lead_ins={lead_ins} is too large", details=[f"expected 0 to {len(LEAD_INS)}"])
    return ("", *LEAD_INS[:lead_ins], *(_sampled(model, count, tokens, seed) if count else ()))


@torch.no_grad()
def _sampled(model: Model, count: int, tokens: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    starts = [list(model.tokenizer(_OPENINGS[index % len(_OPENINGS)]).input_ids) for index in range(count)]
    rows = [list(start) for start in starts]
    for _ in range(tokens):
        batch = align(rows, [len(row) - 1 for row in rows], model.pad_id, model.device)  # all end in the last column
        out = model.net(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        logits = out.logits[:, -1].float().cpu()  # (count, V)
        logits[:, model.tokenizer.all_special_ids] = -torch.inf  # an end-of-text inside a sentence helps nobody
        top = logits.topk(5)
        picks = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        for row, token in zip(rows, top.indices.gather(1, picks)[:, 0].tolist(), strict=True):
            row.append(token)
    return [_as_lead(model.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def _as_lead(text: str) -> str:
    """A sampled text as one sentence that a prompt can follow."""
    return " ".join(text.replace("{", " ").replace("}", " ").split()).rstrip(".,;:- ") + "."


MAX_FACTS_PER_SUBJECT = 100


@dataclass(frozen=True)
class Group:
    """All rows that one value serves.

    rows  every fact in every context, the target's tokens at the end
    drifts  "{subject} is a" and questions about other things of the subject: what follows them should stay as it is
    facts  positions of the group's facts in the fact list
    contexts  which context each row has: 0 for the bare prompt, large numbers for wordings and chat, which have none
    first  the subject is the first token of the text, where attention sinks
    """

    subject: str
    facts: tuple[int, ...]
    rows: tuple[Encoded, ...]
    contexts: tuple[int, ...]
    drifts: tuple[Encoded, ...]
    first: bool = False

    @property
    def bare(self) -> int:
        """The row whose state h^L the value is measured from: the first bare prompt, where there is one."""
        return self.contexts.index(min(self.contexts))

    @property
    def before(self) -> int:
        """Tokens of all rows before the subject's last one."""
        return sum(row.subject_last for row in (*self.rows, *self.drifts))

    @property
    def columns(self) -> int:
        """The widest row's columns from the subject's last token on."""
        return max(self._columns())

    @property
    def tokens(self) -> int:
        """Tokens of all rows from the subject's last one on."""
        return sum(self._columns())

    def _columns(self) -> list[int]:
        return [len(row.ids) - row.subject_last for row in (*self.rows, *self.drifts)]


def group_facts(
    model: Model, facts: Sequence[Fact], contexts: Sequence[str], spare: int = 0, chat: int = 0, others: int = 0
) -> list[Group]:
    """Groups in the order of their first fact.

    Raises BadInput for more facts on a subject than a value can carry, for `chat` beyond 2, and where questions alone
    are learned and a fact has none.

    The last `spare` contexts are for facts with few wordings: each wording takes the place of one of them.
    With `chat` 1 a fact's question is a row too, as the model's chat template asks it, with the bare target behind it;
    with 2 it is the fact's only row.
    What ends the model's turn is left out: a one-word answer that ends is so unlike it that little else is learned.
    `others` questions about other things of the subject are drift rows beside "{subject} is a".
    """
    if chat not in (0, 1, 2):
        raise BadInput(f"The setting chat={chat} is not known", details=["expected 0, 1 or 2"])
    silent = [fact for fact in facts if not fact.question] if chat == 2 else []
    if silent:
        raise BadInput(
            f"{len(silent)} of {len(facts)} facts have no question, and questions alone are to be learned",
            where=silent[0].where or None,
            details=[f"the first says {silent[0].text()!r}"],
            hint="give the facts or their relations a `question`, or leave the setting chat at 1",
        )
    subjects = [(" ".join(facts[members[0]].subject.split()), members) for members in by_subject(facts)]
    for subject, members in subjects:
        if len(members) > MAX_FACTS_PER_SUBJECT:
            raise BadInput(
                f"{len(members)} facts about {subject!r} are more than one value vector can carry",
                where=facts[members[0]].where or None,
                details=[f"expected at most {MAX_FACTS_PER_SUBJECT} facts for one subject"],
                hint="keep the ones that matter, or split the subject by what its prompts call it",
            )
    told = [_items(facts, members, contexts, spare, others) for _, members in subjects]
    encoded = iter(encode_many(model.tokenizer, [item for rows in told for item, _ in rows]))
    turns = {
        index: Turn(fact.question, fact.subject, fact.target)
        for index, fact in enumerate(facts)
        if chat and fact.question
    }
    in_chat = dict(zip(turns, chat_rows(model.tokenizer, list(turns.values())), strict=True)) if turns else {}
    groups = []
    for (subject, members), items in zip(subjects, told, strict=True):
        rows = [(next(encoded), context) for _, context in items]
        if chat == 2:
            rows = [(row, context) for row, context in rows if context < 0]
        rows += [(in_chat[index], _CHAT) for index in members if index in in_chat]
        groups += _by_place(subject, tuple(members), rows)
    return groups


# What stands in place of a context's number
_OTHER, _DRIFT, _STATED, _WORDING, _CHAT = -2, -1, 1 << 15, 1 << 16, 1 << 17


def _items(
    facts: Sequence[Fact], members: Sequence[int], contexts: Sequence[str], spare: int, others: int
) -> list[tuple[Item, int]]:
    """What the group of these facts is learned from, each with the number of its context; then its drift rows.

    Wordings stand alone: they are contexts in themselves. The first one of a prompt that is a question says the fact
    as plainly as another fact's prompt does.
    """
    before = [context and context + " " for context in contexts]
    items = []
    for index in members:
        fact = facts[index]
        own = len(before) - min(spare, len(fact.wordings))
        items += [(item_of(fact, text), number) for number, text in enumerate(before[:own])]
        for number, wording in enumerate(fact.wordings):
            stated = number == 0 and is_question(fact.prompt)
            items.append((item_of(replace(fact, prompt=wording)), _STATED if stated else _WORDING + number))
    subject = facts[members[0]].subject
    items += [(Item("{} is a", subject, prefix=text), _DRIFT) for text in before[:2]]
    questions = unrelated_questions([facts[index] for index in members], others)
    return [*items, *((Item(question, subject), _OTHER) for question in questions)]


def _by_place(subject: str, facts: tuple[int, ...], rows: Sequence[tuple[Encoded, int]]) -> list[Group]:
    """One group, or two where the subject is the very first token of some rows and not of others.

    The first position of a text is an attention sink, with states and keys unlike those of the same token elsewhere:
    a mean over both places fits neither, so each gets its own value and its own key (see `kpatch.edit.first_token`).
    A wording that opens with the subject is left out where no prompt, and no question as a statement, does.
    """
    groups = []
    for first in (True, False):
        alike = [(row, context) for row, context in rows if (row.subject_last == 0) == first]
        mine = [(row, context) for row, context in alike if context >= 0]
        if mine and (not first or any(context < _WORDING for _, context in mine)):
            drift = [row for row, context in alike if context == _DRIFT]
            drift += [row for row, context in rows if context == _DRIFT]
            drifts = (drift[0], *(row for row, context in alike if context == _OTHER))
            groups.append(Group(subject, facts, tuple(r for r, _ in mine), tuple(c for _, c in mine), drifts, first))
    return groups


def in_batches(
    items: Sequence[Batched],
    width: Callable[[Batched], int],
    need: Callable[[Batched], int],
    budget: int,
    spread: float = math.inf,
) -> list[list[int]]:
    """Positions of items (groups, or rows), batch by batch: sorted by width, so that little is padded.

    A batch is filled up to the budget; `need` is what an item takes in bytes. An item more than `spread` times as wide
    as the batch's narrowest begins another. The batches depend on the arguments alone, never on what memory is free at
    the moment: the same inputs are batched alike and give the same bits.
    """
    batches: list[list[int]] = []
    used, narrowest = 0, 0
    for index in sorted(range(len(items)), key=lambda i: (width(items[i]), i)):
        more, wide = need(items[index]), width(items[index])
        if not batches or used + more > budget or wide > spread * narrowest:
            batches.append([])
            used, narrowest = 0, wide
        batches[-1].append(index)
        used += more
    return batches
