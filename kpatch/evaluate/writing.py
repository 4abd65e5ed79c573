"""What a model writes freely: its fluency, as the entropy of word pairs, how much it repeats, its consistency.

Meng et al. 2022 (ROME), section 4.2, and their code: one text of 100 tokens a prompt, drawn from the five likeliest.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from kpatch.evaluate.answers import text_after
from kpatch.evaluate.complete import complete
from kpatch.evaluate.score import BATCH_TOKENS
from kpatch.evaluate.tfidf import TfIdf
from kpatch.facts.fact import SLOT, Fact, fill
from kpatch.facts.join import without_spaces_behind
from kpatch.facts.tokens import Item, encode_many
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

TOKENS = 100
_TOP = 5
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of pairs and triples, in the mean of the two
_RUN = 4  # words in a row that count as repeated
_PIECE = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_MOST_REFERENCES = 20


@dataclass(frozen=True)
class Writing:
    """`texts` of each fact with their prompts in front; the others by fact.

    `fluency` in bits, `repetition` 0 to 1 or None where texts are too short, `consistency` 0 to 1 or None.
    """

    texts: tuple[tuple[str, ...], ...]
    fluency: tuple[float, ...]
    repetition: tuple[float | None, ...]
    consistency: tuple[float | None, ...]


def write_on(
    model: Model,
    facts: Sequence[Fact],
    references: Sequence[Sequence[str]],
    tokens: int = TOKENS,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    report: Reporter = SILENT,
) -> Writing:
    """Let a model go on from every fact's openings (from its prompt where it has none) up to `tokens` tokens.

    `references` are texts about each fact's target; a fact without any has the consistency None. A text depends on
    its prompt and the seed, and not on what else is asked.
    """
    prompts = [
        (number, *((text, fact.subject) if SLOT in text else (SLOT, text)))
        for number, fact in enumerate(facts)
        for text in fact.openings or (fact.prompt,)
    ]
    items = [Item(prompt, subject) for _, prompt, subject in prompts]
    rows = [row.ids for row in encode_many(model.tokenizer, items)]
    texts: list[list[str]] = [[] for _ in facts]
    draws = [_draws(row, tokens, seed) for row in rows]  # the first so many of them are used
    room = [max(1, tokens - len(row)) for row in rows]  # the prompt counts, as in the authors' code
    found = complete(model, rows, room, 0, batch_tokens, report, draws=draws, among=_TOP, doing="Writing")
    for (number, prompt, subject), row, written in zip(prompts, rows, found, strict=True):
        text = text_after(model.tokenizer, row, written.ids)
        texts[number].append(without_spaces_behind(fill(prompt, subject)) + text)
    weights = TfIdf(text for some in references for text in some)
    fluency = tuple(math.fsum(map(entropy, some)) / len(some) for some in texts)
    consistency = tuple(
        weights.cosine(" ".join(some), " ".join(about)) if about else None
        for some, about in zip(texts, references, strict=True)
    )
    return Writing(tuple(map(tuple, texts)), fluency, tuple(map(repetition, texts)), consistency)


def entropy(text: str) -> float:
    """The mean of the entropies of pairs and of triples of words, weighted 2/3 and 4/3, in bits.

    It is low where a text says the same again and again, and 0 for fewer than two words.
    """
    pieces = _PIECE.findall(text)
    total = 0.0
    for size, weight in _WEIGHTS.items():
        counts = Counter(zip(*(pieces[start:] for start in range(size)), strict=False))
        count = sum(counts.values())
        total -= weight * math.fsum(n / count * math.log2(n / count) for n in counts.values())
    return total / len(_WEIGHTS)


def repetition(texts: Sequence[str]) -> float | None:
    """The share of four words in a row that stand earlier in the same text, over all of some texts."""
    runs = repeated = 0
    for text in texts:
        pieces = _PIECE.findall(text)
        found = list(zip(*(pieces[start:] for start in range(_RUN)), strict=False))
        runs += len(found)
        repeated += len(found) - len(set(found))
    return repeated / runs if runs else None


def passages_about(targets: Iterable[str], documents: Iterable[str]) -> dict[str, list[str]]:
    """For each target the first 20 documents that name it as a word."""
    found: dict[str, list[str]] = {target: [] for target in targets}
    if not found:
        return found
    longest_first = sorted(found, key=len, reverse=True)
    names = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    for document in documents:
        for name in {match[0] for match in names.finditer(document)}:
            if len(found[name]) < _MOST_REFERENCES:
                found[name].append(document.strip())
    return found


def _draws(row: Sequence[int], count: int, seed: int) -> torch.Tensor:
    """Uniform numbers [count] that go with this prompt and seed alone."""
    digest = hashlib.sha256(f"kpatch write {seed} {list(row)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)
