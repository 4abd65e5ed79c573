"""What a model answers: greedy completions in batches, and the likeliest next tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kpatch import arguments, distributed
from kpatch.errors import BadInput
from kpatch.evaluate.continuations import logits_after
from kpatch.evaluate.forward import batches, logits_at, vocabulary, window
from kpatch.evaluate.score import BATCH_TOKENS, HEAD_NUMBERS, Ids, Scored, read_targets, scored_as
from kpatch.facts.chat import Turn, chat_rows, turn_ends
from kpatch.facts.join import is_unspaced
from kpatch.models.model import Model, require_loaded
from kpatch.models.partial_forward import Batch, align
from kpatch.reporter import SILENT, Reporter

ANSWER_TOKENS = 6
COMPLETION_TOKENS, CHAT_TOKENS = 12, 64  # how long answers of `ask` may be: behind a prompt, and in a chat
_HELD = 4  # a batch holds so many times `batch_tokens` in its cache: of what it writes it runs one column at a time
_LEAVE = 0.9  # finished rows leave when a smaller share than this goes on: leaving copies the cache of the others
_CONTEXT = 8  # tokens of the prompt decoded with a completion, so that it keeps its leading space


@dataclass(frozen=True, slots=True)
class Token:
    """One candidate for the next token: its text and its probability, 0 to 1."""

    token: str
    probability: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, its greedy completion with the leading space, and the likeliest first tokens."""

    prompt: str
    completion: str
    top: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Greedy:
    """Token ids of one greedy completion without EOS, and (id, probability) of the likeliest first tokens.

    `scored` says how the model takes the targets that were asked about behind the same prompt.
    """

    ids: tuple[int, ...]
    top: tuple[tuple[int, float], ...]
    scored: tuple[Scored, ...] = ()


def ask(
    model: Model,
    prompts: str | Sequence[str],
    top: int = 5,
    max_tokens: int | None = None,
    chat: bool = False,
    report: Reporter = SILENT,
) -> list[Answer]:
    """Complete prompts greedily, with at most `max_tokens` tokens (12, in a chat 64); the model's own EOS ends them.

    One prompt counts as a list of one. Prompts are plain texts; spaces at their end are left out, because they belong
    to the answer's first word. With `chat` each is a user's turn in the model's chat template, and the end of the
    model's turn ends an answer. Nothing is sampled. Raises BadInput for an empty prompt, one that is too long for the
    model, and as `chat_rows` does.
    """
    require_loaded(model)
    arguments.whole_number(top, "top", least=0)
    arguments.whole_number(max_tokens, "max_tokens", least=0)
    given: Any = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(given, Sequence) or not all(isinstance(prompt, str) for prompt in given):
        raise BadInput("`prompts` is no text and no list of texts")
    prompts = list(given)
    rows: Sequence[Sequence[int]]
    if chat:
        rows = [row.ids for row in chat_rows(model.tokenizer, [Turn(prompt) for prompt in prompts])]
        ends, most = turn_ends(model.tokenizer), CHAT_TOKENS
    else:
        rows, ends, most = [plain_ids(model.tokenizer, prompt) for prompt in prompts], frozenset(), COMPLETION_TOKENS
    found = complete(model, rows, most if max_tokens is None else max_tokens, top, report=report, ends=ends)
    answers = []
    for prompt, row, one in zip(prompts, rows, found, strict=True):
        tokens = tuple(Token(text_after(model.tokenizer, row, [token]), chance) for token, chance in one.top)
        answers.append(Answer(prompt, text_after(model.tokenizer, row, one.ids), tokens))
    return answers


def answer_rows(
    model: Model,
    rows: Sequence[Ids],
    chat: bool,
    ends_text: Callable[[str], bool],
    tokens: int = CHAT_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    doing: str = "Answering",
    report: Reporter = SILENT,
) -> list[str]:
    """What the model writes behind each row, at most `tokens` tokens; a row that comes twice is run once.

    An answer ends with the model's own EOS, in a chat with the end of its turn too, and otherwise where `ends_text`
    holds of what is written. Near the end of the model's positions it has as many tokens as fit. Raises as `complete`.
    """
    distinct = list(dict.fromkeys(tuple(row) for row in rows))
    longest = window(model)
    room = [tokens if longest is None else max(1, min(tokens, longest - len(row) + 1)) for row in distinct]

    def ended(row: Ids, written: Ids) -> bool:
        return ends_text(text_after(model.tokenizer, row, written))

    found = complete(
        model,
        distinct,
        room,
        batch_tokens=batch_tokens,
        report=report,
        doing=doing,
        ends=turn_ends(model.tokenizer) if chat else (),
        until=None if chat else ended,
    )
    texts = {row: text_after(model.tokenizer, row, one.ids) for row, one in zip(distinct, found, strict=True)}
    return [texts[tuple(row)] for row in rows]


def says(text: str, answer: str) -> bool:
    """Whether a text has an answer in it, in letters of any case; as whole words where spaces part words."""
    return _spot(answer).search(folded(text)) is not None


def without(text: str, answer: str) -> str:
    """A text in small letters, with nothing where it says `answer`."""
    return _spot(answer).sub("", folded(text))


def folded(text: str) -> str:
    """A text as `says` compares it: small letters, one space between words."""
    return " ".join(text.split()).casefold()


def _spot(answer: str) -> re.Pattern[str]:
    wanted = folded(answer)
    before = "" if is_unspaced(wanted[0]) else r"(?<!\w)"
    after = "" if is_unspaced(wanted[-1]) else r"(?!\w)"
    return re.compile(before + re.escape(wanted) + after)


def first_words(text: str) -> str:
    """The first line of an answer that has words, without spaces around it."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


@torch.no_grad()
def complete(
    model: Model,
    rows: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    top: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    report: Reporter = SILENT,
    draws: Sequence[Tensor] | None = None,
    among: int = 1,
    doing: str = "Answering",
    targets: Sequence[Sequence[Ids]] = (),
    ends: Collection[int] = (),
    until: Callable[[Ids, Ids], bool] | None = None,
) -> list[Greedy]:
    """Complete rows of ids greedily; results come in the order of `rows`.

    Rows are batched by length and padded on the left. `max_tokens` is one number for all rows, or one for each.
    `draws` holds uniform numbers [its max_tokens or more] for each row: a token is then drawn from the `among`
    likeliest. It is never a special one, so such a text does not end. `targets` of each row, none longer than its
    max_tokens, are scored as `score` does, on the same run of the prompt. A text ends with the model's own EOS, with
    one of `ends`, and where `until`, given the row and what is written behind it, says so.
    Raises BadInput for an empty row, and for one that leaves no room for `max_tokens` in the model's positions.
    """
    longest = window(model)
    room = [max_tokens] * len(rows) if isinstance(max_tokens, int) else list(max_tokens)
    for index, (row, most) in enumerate(zip(rows, room, strict=True)):
        if not len(row):
            raise BadInput(f"Prompt {index + 1} is empty, and this model's tokenizer puts no token before it")
        if longest is not None and len(row) + most - 1 > longest:
            raise BadInput(
                f"Prompt {index + 1} is too long for {model.name}",
                details=[f"expected at most {longest} tokens with the answer", f"found {len(row)} + {most}"],
            )
    stops = _Stops({*end_ids(model), *ends}, until)
    order = sorted(range(len(rows)), key=lambda index: tuple(rows[index]))
    lengths = [max(len(rows[index]), (len(rows[index]) + room[index]) // _HELD) for index in order]
    most = HEAD_NUMBERS // vocabulary(model)
    results: dict[int, Greedy] = {}
    with report.task(doing, total=len(rows), unit="prompt") as advance:
        # Every later token reads all weights again for every batch, so some padding is cheaper than another batch
        planned = batches(lengths, [1] * len(rows), batch_tokens, most, filled=0.5)

        def run(places: Sequence[int]) -> list[Greedy]:
            batch = [order[place] for place in places]
            some = None if draws is None else [draws[i] for i in batch]
            asked = [targets[i] for i in batch] if targets else ()
            chosen, their = [rows[i] for i in batch], [room[i] for i in batch]
            done = _complete_batch(model, chosen, their, top, some, among, asked, stops)
            advance(len(batch))
            return done

        for places, done in zip(planned, distributed.share(planned, run), strict=True):
            results.update(zip((order[place] for place in places), done, strict=True))
    return [results[index] for index in range(len(rows))]


@dataclass(frozen=True, slots=True)
class _Stops:
    """When a text is at its end: a token of `ends`, or a row and what is written behind it that `until` is true of."""

    ends: Collection[int]
    until: Callable[[Ids, Ids], bool] | None

    def end(self, row: Ids, written: Ids) -> bool:
        return written[-1] in self.ends or (self.until is not None and self.until(row, written))


def _complete_batch(
    model: Model,
    rows: Sequence[Sequence[int]],
    room: Sequence[int],
    top: int,
    draws: Sequence[Tensor] | None,
    among: int,
    targets: Sequence[Sequence[Ids]],
    stops: _Stops,
) -> list[Greedy]:
    batch = align(rows, [len(row) - 1 for row in rows], model.pad_id, model.device)
    ids, mask, positions = batch.ids, batch.mask, batch.positions
    cache: Any = None
    candidates: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
    scored: list[tuple[Scored, ...]] = [()] * len(rows)
    written: list[list[int]] = [[] for _ in rows]
    held = list(range(len(rows)))  # the rows that the batch still holds
    going = [number for number in held if room[number]]
    for step in range(max(room, default=0)):
        every = torch.arange(len(held))
        logits, out = logits_at(
            model,
            ids,
            every,
            torch.full_like(every, ids.shape[1] - 1),
            mask.bool() if step == 0 else None,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        if step == 0 and top:
            chances, tokens = logits.softmax(-1).topk(min(top, logits.shape[-1]))  # [B, top]
            pairs = zip(tokens.tolist(), chances.tolist(), strict=True)
            candidates = [tuple(zip(some, their, strict=True)) for some, their in pairs]
        if step == 0 and targets:
            scored = _score_after(model, batch, out.past_key_values, logits, targets)
        if draws is None:
            best = logits.argmax(-1)  # [B]
        else:
            best = _draw(model, logits, torch.stack([draws[number][step] for number in held]), among)
        now = dict(zip(held, best.tolist(), strict=True))
        for number in going:
            written[number].append(now[number])
        going = [n for n in going if step + 1 < room[n] and not stops.end(rows[n], written[n])]
        if not going:
            break
        cache, ids, positions = out.past_key_values, best[:, None].to(model.device), positions[:, -1:] + 1
        if len(going) <= _LEAVE * len(held):
            stay = torch.tensor([held.index(number) for number in going], device=model.device)
            cache.reorder_cache(stay)  # takes rows, whatever a layer keeps
            ids, positions, mask, held = ids[stay], positions[stay], mask[stay], going
        mask = torch.cat([mask, mask.new_ones(len(held), 1)], dim=1)
    return [
        Greedy(tuple(token for token in some if token not in stops.ends), first, about)
        for some, first, about in zip(written, candidates, scored, strict=True)
    ]


def _score_after(
    model: Model, batch: Batch, cache: Any, first: Tensor, targets: Sequence[Sequence[Ids]]
) -> list[tuple[Scored, ...]]:
    """Score targets behind each row of a batch: first tokens by its logits `first` [B, V], others on its cache."""
    every = [(row, target) for row, some in enumerate(targets) for target in some]
    rows = torch.tensor([row for row, _ in every], dtype=torch.long)
    logprobs, best = read_targets(first, rows, torch.tensor([target[0] for _, target in every], dtype=torch.long))
    found = [([value], [token]) for value, token in zip(logprobs, best, strict=True)]
    longer = [number for number, (_, target) in enumerate(every) if len(target) > 1]
    columns = [len(every[number][1]) - 1 for number in longer]
    lengths = [batch.ids.shape[1] + column for column in columns]  # each has its prompt's columns copied
    for numbers in batches(lengths, columns, BATCH_TOKENS, HEAD_NUMBERS // vocabulary(model)):
        some = [longer[place] for place in numbers]
        tails = [every[number][1] for number in some]
        spots = [(row, column) for row, tail in enumerate(tails) for column in range(len(tail) - 1)]
        logits = logits_after(model, batch, cache, [every[n][0] for n in some], [tail[:-1] for tail in tails], spots)
        wanted = torch.tensor([token for tail in tails for token in tail[1:]])
        logprobs, best = read_targets(logits, torch.arange(len(spots)), wanted)
        for (row, _), value, token in zip(spots, logprobs, best, strict=True):
            found[some[row]][0].append(value)
            found[some[row]][1].append(token)
    done = iter(scored_as(model, target, *one) for (_, target), one in zip(every, found, strict=True))
    return [tuple(next(done) for _ in some) for some in targets]


def _draw(model: Model, logits: Tensor, uniform: Tensor, among: int) -> Tensor:
    """Draw one of the `among` likeliest tokens of each row [B] by inverting the cumulated shares; none is special."""
    added = (index for index, token in model.tokenizer.added_tokens_decoder.items() if token.special)
    special = [index for index in {*added, *end_ids(model)} if index < logits.shape[-1]]
    logits = logits.index_fill(1, torch.tensor(special, dtype=torch.long, device=logits.device), -torch.inf)
    likeliest = logits.topk(min(among, logits.shape[-1]))
    shares = likeliest.values.double().softmax(-1).cumsum(-1).cpu()
    place = torch.searchsorted(shares, uniform[:, None] * shares[:, -1:], right=True).clamp(max=shares.shape[1] - 1)
    return likeliest.indices.cpu().gather(1, place)[:, 0]


def end_ids(model: Model) -> set[int]:
    """The ids that end a text: the tokenizer's EOS and those of the model's generation settings."""
    settings = getattr(model.net, "generation_config", None)
    given = getattr(settings, "eos_token_id", None)
    ends = set(given) if isinstance(given, list | tuple) else {given}
    ends.add(model.tokenizer.eos_token_id)
    return {int(end) for end in ends if end is not None}


def text_after(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` as it continues `before`.

    Some tokenizers drop the first word's space where they decode it alone.
    """
    context = list(before[-_CONTEXT:])
    head = tokenizer.decode(context, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode([*context, *ids], clean_up_tokenization_spaces=False)
    if whole.startswith(head):
        return str(whole[len(head) :])
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that the model goes on with."""
    ids = list(tokenizer(text.rstrip(" "))["input_ids"])
    # Some tokenizers put EOS behind every text; an answer is to follow here
    while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids
