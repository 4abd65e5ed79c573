"""Greedy completions of many rows: the one place where a model writes token after token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.errors import BadInput
from kpatch.evaluate.continuations import logits_after
from kpatch.evaluate.forward import batches, vocabulary, window
from kpatch.evaluate.running import Running, has_plain_cache
from kpatch.evaluate.score import BATCH_TOKENS, HEAD_NUMBERS, Ids, Scored, read_targets, scored_as
from kpatch.models.model import Model
from kpatch.models.partial_forward import Batch
from kpatch.reporter import SILENT, Advance, Reporter

_HELD = 4  # rows hold so many times `batch_tokens` in their cache: of what they write they run one column at a time
_LEAVE = 0.9  # finished rows leave when a smaller share than this goes on: leaving copies the cache of the others


@dataclass(frozen=True, slots=True)
class Greedy:
    """Token ids of one greedy completion without EOS, and (id, probability) of the likeliest first tokens.

    `scored` says how the model takes the targets that were asked about behind the same prompt.
    """

    ids: tuple[int, ...]
    top: tuple[tuple[int, float], ...]
    scored: tuple[Scored, ...] = ()


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
    ends: Sequence[Collection[int]] = (),
    until: Callable[[int, Ids], bool] | None = None,
) -> list[Greedy]:
    """Complete rows of ids greedily; results come in the order of `rows`.

    Rows are batched by length and padded on the left. `max_tokens` is one number for all rows, or one for each.
    `draws` holds uniform numbers [its max_tokens or more] for each row: a token is then drawn from the `among`
    likeliest. It is never a special one, so such a text does not end. `targets` of each row, none longer than its
    max_tokens, are scored as `score` does, on the same run of the prompt. A text ends with the model's own EOS, with
    one of its row's `ends`, and where `until`, given the row's index and what is written behind it, says so.
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
    own = end_ids(model)
    stops = _Stops([own.union(some) for some in ends] if ends else [own] * len(rows), until)
    order = [index for index in sorted(range(len(rows)), key=lambda index: tuple(rows[index])) if room[index]]
    lengths = [max(len(rows[index]), (len(rows[index]) + room[index]) // _HELD) for index in order]
    most = HEAD_NUMBERS // vocabulary(model)
    plain = has_plain_cache(model)
    # Every later token reads all weights again for every batch, so some padding is cheaper than another batch
    size = batch_tokens // 2 if plain else batch_tokens  # so that a batch fits beside what is left of others
    planned = [
        [order[place] for place in places]
        for places in batches(lengths, [1] * len(order), size, most if not plain else most // 2, filled=0.5)
    ]
    limit = (_HELD * batch_tokens, most) if plain else (0, 0)
    with report.task(doing, total=len(rows), unit="prompt") as advance:
        advance(len(rows) - len(order))

        def run(some: Sequence[Sequence[int]]) -> dict[int, Greedy]:
            return _Writer(model, rows, room, top, draws, among, targets, stops, limit, advance).write(some)

        ranks = distributed.ranks()
        done = distributed.share([planned[rank::ranks] for rank in range(ranks)], run)
    results = {number: one for some in done for number, one in some.items()}
    return [results.get(index, Greedy((), (), ())) for index in range(len(rows))]


@dataclass(frozen=True, slots=True)
class _Stops:
    """When a row is at its end: a token of its `ends`, or what is written behind it that `until` is true of."""

    ends: Sequence[Collection[int]]
    until: Callable[[int, Ids], bool] | None

    def end(self, number: int, written: Ids) -> bool:
        return written[-1] in self.ends[number] or (self.until is not None and self.until(number, written))


@dataclass
class _Writer:
    """Writes behind rows, batch after batch: the next one joins where rows have left and it fits in `limit`.

    limit  (columns of all rows held in the cache, padding and room counted; rows)
    """

    model: Model
    rows: Sequence[Sequence[int]]
    room: Sequence[int]
    top: int
    draws: Sequence[Tensor] | None
    among: int
    targets: Sequence[Sequence[Ids]]
    stops: _Stops
    limit: tuple[int, int]
    advance: Advance

    def write(self, planned: Sequence[Sequence[int]]) -> dict[int, Greedy]:
        """What is written behind the rows of some batches, by the numbers of the rows."""
        self.written: dict[int, list[int]] = {number: [] for batch in planned for number in batch}
        self.ended: set[int] = set()  # some of them stay for a while: leaving costs
        first: dict[int, tuple[tuple[tuple[int, float], ...], tuple[Scored, ...]]] = {}
        waiting = deque(planned)
        running: Running | None = None
        while waiting or running:
            if running is not None and (not waiting or not self._fits(running, waiting[0])):
                running = self._go_on(running, running.step())
                continue
            new = Running(self.model, waiting[0], [self.rows[number] for number in waiting.popleft()])
            logits = new.step()
            first.update(zip(new.numbers, self._first(new, logits), strict=True))
            joining = self._go_on(new, logits)
            if running is None or joining is None:
                running = running or joining
            else:
                running.join(joining)
        return {
            number: Greedy(tuple(token for token in some if token not in self.stops.ends[number]), *first[number])
            for number, some in self.written.items()
        }

    def _fits(self, running: Running, batch: Sequence[int]) -> bool:
        """Whether a batch can be held beside what is running, when every row takes all of its room."""
        left = max(self.room[number] - len(self.written[number]) for number in running.numbers)
        theirs = max(len(self.rows[number]) for number in batch) + max(self.room[number] for number in batch)
        count = len(running.numbers) + len(batch)
        return count * max(running.width + left, theirs) <= self.limit[0] and count <= self.limit[1]

    def _first(self, new: Running, logits: Tensor) -> list[tuple[tuple[tuple[int, float], ...], tuple[Scored, ...]]]:
        """The likeliest first tokens and the scored targets of each row, by logits [B, V] behind its prompt."""
        candidates: list[tuple[tuple[int, float], ...]] = [()] * len(logits)
        scored: list[tuple[Scored, ...]] = [()] * len(logits)
        if self.top:
            chances, tokens = logits.softmax(-1).topk(min(self.top, logits.shape[-1]))  # [B, top]
            pairs = zip(tokens.tolist(), chances.tolist(), strict=True)
            candidates = [tuple(zip(some, their, strict=True)) for some, their in pairs]
        if self.targets:
            asked = [self.targets[number] for number in new.numbers]
            scored = _score_after(self.model, new.batch, new.cache, logits, asked)
        return list(zip(candidates, scored, strict=True))

    def _go_on(self, running: Running, logits: Tensor) -> Running | None:
        """Put a token behind every row by logits [B, V]; None where all rows are at their end."""
        if self.draws is None:
            best = logits.argmax(-1)  # [B]
        else:
            uniform = [self.draws[number][len(self.written[number]) % self.room[number]] for number in running.numbers]
            best = _draw(self.model, logits, torch.stack(uniform), self.among)
        going = []
        for place, (number, token) in enumerate(zip(running.numbers, best.tolist(), strict=True)):
            if number in self.ended:
                continue
            some = self.written[number]
            some.append(token)
            if len(some) == self.room[number] or self.stops.end(number, some):
                self.ended.add(number)
                self.advance(1)
            else:
                going.append(place)
        if not going:
            return None
        running.take(best)
        if len(going) <= _LEAVE * len(running.numbers):
            running.keep(going)
        return running


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
