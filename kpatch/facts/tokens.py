"""Facts as tokens: prompt, subject and target as ids, where the subject lies, and what is too long to be learned.

Needs a fast tokenizer of Hugging Face (its character offsets), but imports none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kpatch.errors import BadInput
from kpatch.facts.fact import SLOT, Fact, fill
from kpatch.facts.join import join, trimmed, without_spaces_behind
from kpatch.facts.problems import cut, limited

# Texts put before a target where its prompt's last token would merge with it; the first that does not is used
_ANCHORS = ("\n", ".", "a", "1", "。")
LONGEST_TARGET = 32


class Item(NamedTuple):
    """A text to tokenize: `prefix` as it is, `prompt` with the subject in its {}, what joins, the target if any.

    `space` is the fact's own key: what stands between prompt and target, None where the rules say it (`facts.join`).
    """

    prompt: str
    subject: str
    target: str | None = None
    prefix: str = ""
    space: bool | None = None


AnyItem = Item | tuple[str, str, str | None, str]


def item_of(fact: Fact, prefix: str = "") -> Item:
    """A fact's prompt and target behind `prefix`."""
    return Item(fact.prompt, fact.subject, fact.target, prefix, fact.space)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row of token ids: special tokens in front (BOS, where the tokenizer adds one), prompt, target; never EOS.

    `subject_last` is the index of the token that carries the subject's last character;
    `ids[:prompt_len]` is the prompt just as the tokenizer gives it, `ids[prompt_len:]` the target.
    """

    ids: tuple[int, ...]
    subject_last: int
    prompt_len: int


def require_fast(tokenizer: Any) -> None:
    """Raise BadInput for a tokenizer without character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            "This model comes with a slow tokenizer only, which does not tell where a word's tokens are",
            details=[f"found {type(tokenizer).__name__}; expected one with a tokenizer.json"],
            hint="put a tokenizer.json beside the model: load its tokenizer with transformers and save it again",
        )


def encode(
    tokenizer: Any,
    prompt: str,
    subject: str,
    target: str | None = None,
    prefix: str = "",
    space: bool | None = None,
) -> Encoded:
    """Tokens of `prefix` + `prompt` with the subject in its {} + `target`; see `encode_many`."""
    return encode_many(tokenizer, [Item(prompt, subject, target, prefix, space)])[0]


def encode_many(tokenizer: Any, items: Sequence[AnyItem]) -> list[Encoded]:
    """Tokens of many items, with one call of the tokenizer.

    A prefix is put before the prompt as it is, so it brings its own space. Spaces at a prompt's end are left out,
    line ends and tabs stay. `facts.join` says what stands before the target.
    Raises BadInput for a prompt without exactly one {}, and where the tokenizer keeps nothing of a subject or target.
    """
    return [spanned.row for spanned in encode_spans(tokenizer, items)]


class Spanned(NamedTuple):
    """A row with its subject's tokens: the index of the first, and what the last one covers behind the subject."""

    row: Encoded
    first: int
    beyond: str = ""


def encode_spans(tokenizer: Any, items: Sequence[AnyItem]) -> list[Spanned]:
    """As `encode_many`, each with the tokens of its subject."""
    return _encode(tokenizer, [_place(Item(*item)) for item in items], lead_ids(tokenizer))


class Written(NamedTuple):
    """A text that stands as it is, its subject's characters [begin, end), and behind it `between` and `target`."""

    text: str
    begin: int
    end: int
    target: str | None = None
    between: str = ""


def encode_written(tokenizer: Any, rows: Sequence[Written]) -> list[Encoded]:
    """Tokens of texts that bring their own special tokens, as a chat template writes them.

    Nothing is put in front and nothing is cut at the end. Raises BadInput where the tokenizer keeps nothing of a
    subject or target.
    """
    placed = [
        _Row(text, text if target is None else text + between + target, begin, end, text[begin:end], target)
        for text, begin, end, target, between in rows
    ]
    return [spanned.row for spanned in _encode(tokenizer, placed, ())]


_AT_ONCE = 2000  # rows: the tokenizer's account of them takes thirty times what is kept


def _encode(tokenizer: Any, rows: Sequence[_Row], lead: Sequence[int]) -> list[Spanned]:
    known: dict[int, int] = {}  # one object for a token, however often it comes
    return [
        spanned
        for begin in range(0, len(rows), _AT_ONCE)
        for spanned in _encode_some(tokenizer, rows[begin : begin + _AT_ONCE], lead, known)
    ]


def _encode_some(
    tokenizer: Any, rows: Sequence[_Row], lead: Sequence[int], known: dict[int, int]
) -> Iterator[Spanned]:
    wanted = dict.fromkeys(text for row in rows for text in (row.text, row.whole))
    tokens = dict(zip(wanted, _tokenize(tokenizer, list(wanted)), strict=True))
    targets = _targets(tokenizer, rows, tokens)
    for row, target_ids in zip(rows, targets, strict=True):
        found = tokens[row.text]
        first, last = _subject_tokens(found.offsets, row)
        ids = tuple(known.setdefault(token, token) for token in (*lead, *found.ids, *target_ids))
        encoded = Encoded(ids, len(lead) + last, len(lead) + len(found.ids))
        beyond = row.text[row.end : found.offsets[last][1]].strip()
        yield Spanned(encoded, len(lead) + first, beyond)


def encode_target(tokenizer: Any, text: str, target: str, space: bool | None = None) -> tuple[int, ...]:
    """The ids of `target` behind `text`, with what stands between them; see `facts.join`.

    Raises BadInput where the tokenizer keeps nothing of it.
    """
    row = _place(Item(SLOT, text, target, "", space))
    tokens = dict(zip((row.text, row.whole), _tokenize(tokenizer, [row.text, row.whole]), strict=True))
    return tuple(next(_targets(tokenizer, [row], tokens)))


def lead_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text; those behind it (EOS) are not wanted."""
    for text in ("a", "1", ".", "。"):
        plain = _tokenize(tokenizer, [text])[0].ids
        whole = list(tokenizer(text, padding=False, truncation=False)["input_ids"])
        for begin in range(len(whole) - len(plain) + 1):
            if plain and whole[begin : begin + len(plain)] == plain:
                return tuple(whole[:begin])
    raise BadInput("This tokenizer gives other tokens for a text when it adds its special ones")


def check_lengths(tokenizer: Any, facts: Iterable[Fact], limit: int = LONGEST_TARGET) -> None:
    """Raise BadInput that names every fact whose target is longer than `limit` tokens."""
    facts = list(facts)
    rows = encode_many(tokenizer, [item_of(fact) for fact in facts])
    wrong = []
    for fact, row in zip(facts, rows, strict=True):
        length = len(row.ids) - row.prompt_len
        if length > limit:
            wrong.append(f"{name_of(fact)}: the target {cut(fact.target)!r} has {length} tokens")
    if wrong:
        count = "A target is" if len(wrong) == 1 else f"{len(wrong):,} targets are"
        raise BadInput(
            f"{count} longer than {limit} tokens",
            details=limited(wrong),
            hint="a target is a name or a short phrase; put the rest into the prompt, or leave it out",
        )


def name_of(fact: Fact) -> str:
    """How messages name a fact: where it stands, else its id, else its subject."""
    return fact.where or fact.id or repr(fact.subject)


class _Tokens(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]


class _Row(NamedTuple):
    text: str  # prefix and prompt, subject in place, no space at the end
    whole: str  # the same and the target
    begin: int  # the subject's characters in `text`
    end: int
    subject: str
    target: str | None


def _place(item: Item) -> _Row:
    if item.prompt.count(SLOT) != 1:
        raise BadInput("A prompt must have exactly one {}", details=[f"found {item.prompt!r}"])
    subject = item.subject.strip()
    if not subject:
        raise BadInput("A subject is empty", details=[f"in the prompt {item.prompt!r}"])
    given = trimmed(item.subject)  # a text that is asked as a whole is its own subject, and keeps its line end
    begin = len(item.prefix) + item.prompt.index(SLOT) + given.index(subject)
    whole = text = without_spaces_behind(item.prefix + fill(item.prompt, given))
    target = item.target
    if target is not None:
        target = target.strip()
        whole = text + join(text, target, item.space) + target
    return _Row(text, whole, begin, begin + len(subject), subject, target)


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> list[_Tokens]:
    """Ids without special tokens, and for each token its characters [begin, end) in the text as it was given."""
    require_fast(tokenizer)
    if not texts:
        return []
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    return [_Tokens(ids, offsets) for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)]


def _subject_tokens(offsets: Sequence[tuple[int, int]], row: _Row) -> tuple[int, int]:
    """The subject's first token, and the last one that covers its last character.

    A character of several tokens (bytes) ends with the last of them; a token may reach beyond the subject (a merge).
    Where a normalizer or the vocabulary dropped that character, the last token of what is left of the subject.
    """
    last = row.end - 1
    first = best = None
    for index, (begin, end) in enumerate(offsets):
        if begin > last:
            break
        if end > row.begin:
            best = index
            first = index if first is None else first
    if first is None or best is None:
        raise BadInput(
            f"The tokenizer keeps nothing of the subject {row.subject!r}",
            details=[f"in {cut(row.text)!r}"],
            hint="this model does not know the subject's script; write it in another one",
        )
    return first, best


def _targets(tokenizer: Any, rows: Sequence[_Row], tokens: dict[str, _Tokens]) -> Iterator[Sequence[int]]:
    """Each row's target ids: what follows the prompt's own ids, or the target behind an anchor where they merge."""
    merged: dict[str, Sequence[int]] = {}
    for row in rows:
        prompt, whole = tokens[row.text].ids, tokens[row.whole].ids
        if row.target is None:
            yield ()
            continue
        if whole[: len(prompt)] == prompt:
            ids: Sequence[int] = tuple(whole[len(prompt) :])
        else:
            rest = row.whole[len(row.text) :]
            ids = merged[rest] if rest in merged else merged.setdefault(rest, _alone(tokenizer, rest))
        if not ids:
            raise BadInput(
                f"The tokenizer keeps nothing of the target {row.target!r}",
                details=[f"behind {cut(row.text)!r}"],
                hint="this model does not know the target's script; write it in another one",
            )
        yield ids


def _alone(tokenizer: Any, rest: str) -> Sequence[int]:
    """The ids of `rest` (a target, with its space or without) behind some text that does not merge with it.

    Not tokenized by itself: tokenizers of SentencePiece's kind put a space of their own before a text's first word.
    """
    for anchor in _ANCHORS:
        before, whole = (found.ids for found in _tokenize(tokenizer, [anchor, anchor + rest]))
        if before and whole[: len(before)] == before and len(whole) > len(before):
            return tuple(whole[len(before) :])
    return tuple(_tokenize(tokenizer, [rest])[0].ids)
