"""What a careful reader would say about checked facts; with a tokenizer, also how a model will read them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kpatch.errors import BadInput
from kpatch.facts.conflicts import normal
from kpatch.facts.fact import SLOT, Fact, FactFile
from kpatch.facts.invisible import invisible_in, looks
from kpatch.facts.join import is_unspaced, join, without_spaces_behind
from kpatch.facts.problems import cut
from kpatch.facts.tokens import LONGEST_TARGET, Spanned, encode_spans, item_of, lead_ids, name_of, require_fast

WORDY_TARGET = 20  # tokens
CROWDED_SUBJECT = 10  # facts
_LOADED = re.compile(r"(?P<where>.*?:\d+:\d+): (?P<message>.*)", re.DOTALL)
_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7ff]")
_LAST_WORD, _FIRST_WORD = re.compile(r"\w+[^\S\n]*\Z"), re.compile(r"\w+")
_CHAT = re.compile(r"<[^<>\s]+>|\[/?INST\]|\b(?:assistant|answer|A)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to look at; `level` is "error" (`make` will refuse it) or "warning", `fact` the id."""

    level: str
    code: str
    message: str
    where: str = ""
    fact: str = ""


@dataclass(frozen=True, slots=True)
class Tokens:
    """How a tokenizer splits one fact.

    `subject_last` is the index of the subject's last token in the whole row, special tokens counted. `join` is what
    stands between prompt and target: a space or nothing; a line end at the prompt's end is part of the prompt.
    """

    fact: str
    where: str
    subject: tuple[str, ...]
    target: tuple[str, ...]
    subject_last: int
    join: str = " "


@dataclass(frozen=True, slots=True)
class LintReport:
    """All findings in the file's order, and with a tokenizer the tokens of every fact."""

    facts: int
    findings: tuple[Finding, ...]
    tokens: tuple[Tokens, ...] = ()

    @property
    def errors(self) -> int:
        """How many findings `make` will refuse."""
        return sum(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def lint(file: FactFile, tokenizer: Any = None, known: Collection[int] = ()) -> LintReport:
    """Findings about the facts of `file`; `known` are the positions of those whose target the model gives already.

    Raises BadInput for a slow tokenizer, and nothing else.
    """
    findings = [_loaded(warning) for warning in file.warnings]
    for fact in file.facts:
        findings += _words(fact)
    findings += [*_crowds(file.facts), *_look_alikes(file.facts)]
    for index in sorted(known):
        fact = file.facts[index]
        message = f"the model already gives the target {fact.target!r}: there is nothing to learn"
        findings.append(Finding("warning", "known", message, fact.where, fact.id))
    if tokenizer is None:
        keys: list[tuple[Fact, Hashable]] = [(fact, _until_subject(fact)) for fact in file.facts]
        return LintReport(len(file.facts), (*findings, *_shared_keys(keys)))
    require_fast(tokenizer)
    lead, pieces = len(lead_ids(tokenizer)), _Pieces(tokenizer)
    tokens = []
    keys = []
    for fact, found in zip(file.facts, _encode(tokenizer, file.facts), strict=True):
        if isinstance(found, BadInput):
            message = "; ".join((found.message, *found.details))
            findings.append(Finding("error", "untokenizable", message, fact.where, fact.id))
            continue
        row, first, _ = found
        last = row.subject_last
        subject, target = pieces.of(row.ids[first : last + 1]), pieces.of(row.ids[row.prompt_len :])
        between = join(without_spaces_behind(fact.text()), fact.target, fact.space)
        tokens.append(Tokens(fact.id, fact.where, subject, target, last, between))
        findings += _tokenized(tokenizer, fact, found, lead)
        findings += _spaced(fact, between, "".join(target))
        keys.append((fact, row.ids[: last + 1]))
    return LintReport(len(file.facts), (*findings, *_shared_keys(keys)), tuple(tokens))


def _loaded(warning: str) -> Finding:
    found = _LOADED.fullmatch(warning)
    if not found:
        return Finding("warning", "file", warning)
    return Finding("warning", "file", found["message"], found["where"])


def _words(fact: Fact) -> Iterator[Finding]:
    """What can be seen without a model."""

    def warn(code: str, message: str) -> Finding:
        return Finding("warning", code, message, fact.where, fact.id)

    subject, target = normal(fact.subject).casefold(), normal(fact.target).casefold()
    if fact.prompt != without_spaces_behind(fact.prompt):
        yield warn("trailing-space", "the prompt ends in a space, which is left out")
    if fact.prompt.endswith("\n") and not _CHAT.search(fact.prompt):
        yield warn("line-end", "the prompt ends in a line end, so the target is learned as the next line's beginning")
    inside = _inside_word(fact)
    if inside:
        yield warn("in-word", f"the subject {inside}, so its tokens may be those of another word")
    if "  " in fact.prompt.strip():
        yield warn("double-space", "the prompt has two spaces in a row")
    twice = _said_twice(fact)
    if twice:
        yield warn("twice", f"the prompt ends in {twice!r} and the target begins with it: the model learns it twice")
    if subject == target:
        yield warn("same", f"subject and target are the same: {fact.target!r}")
    if fact.was is not None and normal(fact.was).casefold() == target:
        yield warn("no-change", f"'was' and the target are the same: {fact.target!r}")
    if fact.target.endswith((".", "!", "?")) and len(fact.target.split()) > 1:
        yield warn("full-stop", f"the target ends in {fact.target[-1]!r}, which the model will learn with it")
    for text in fact.paraphrases:
        if SLOT not in text and subject not in normal(text).casefold():
            yield warn("paraphrase", f"a paraphrase does not name the subject: {text!r}")
        if normal(text) == normal(fact.prompt):
            yield warn("paraphrase", f"a paraphrase is the prompt itself: {text!r}")
    for neighbor in fact.neighbors:
        if subject in normal(neighbor.prompt).casefold():
            yield warn("neighbor", f"a neighbor names the subject, whose answer is to change: {neighbor.prompt!r}")
    for key in ("subject", "target", "prompt"):
        text = getattr(fact, key)
        hidden = invisible_in(text)
        if hidden:
            yield warn("invisible", f"the {key} holds the invisible character {hidden}")
        if not text.isascii() and not unicodedata.is_normalized("NFC", text):
            yield warn("decomposed", f"the {key} has accents as characters of their own, which models read otherwise")


def _inside_word(fact: Fact) -> str:
    """Where the subject begins or ends inside a word, in words for a message; else nothing."""
    before, slot, behind = fact.prompt.partition(SLOT)
    subject = fact.subject
    if not slot:
        return ""
    if _one_word(subject[-1:] + behind[:1]):
        rest = re.match(r"\w*", behind)
        return f"ends inside a word ({cut(subject)}{rest[0] if rest else ''})"
    if _one_word(before[-1:] + subject[:1]):
        start = re.search(r"\w*\Z", before)
        return f"begins inside a word ({start[0] if start else ''}{cut(subject)})"
    return ""


def _one_word(pair: str) -> bool:
    """True where no word ends between two characters; Korean endings and scripts without spaces are no mistake."""
    return len(pair) == 2 and not any(
        not sign.isalnum() or is_unspaced(sign) or _HANGUL.match(sign) is not None for sign in pair
    )


def _said_twice(fact: Fact) -> str:
    """The word that stands at the prompt's end and at the target's beginning; else nothing."""
    last = _LAST_WORD.search(fact.prompt.partition(SLOT)[2])
    first = _FIRST_WORD.match(fact.target)
    same = last and first and normal(last[0]).casefold() == normal(first[0]).casefold()
    return first[0] if same and first and not is_unspaced(first[0][0]) else ""


def _look_alikes(facts: Sequence[Fact]) -> Iterator[Finding]:
    """Subjects that look like another fact's, and are not."""
    first: dict[str, Fact] = {}
    for fact in facts:
        other = first.setdefault(looks(fact.subject), fact)
        if normal(other.subject) != normal(fact.subject):
            message = f"the subject looks like that of {name_of(other)}, but has other characters: {fact.subject!a}"
            yield Finding("warning", "look-alike", message, fact.where, fact.id)


def _until_subject(fact: Fact) -> str:
    return fact.prompt.partition(SLOT)[0] + fact.subject


def _shared_keys(keys: Iterable[tuple[Fact, Hashable]]) -> Iterator[Finding]:
    """Facts of different subjects with the same text (or tokens) up to the subject's end: one key, two values."""
    first: dict[Hashable, Fact] = {}
    for fact, start in keys:
        other = first.setdefault(start, fact)
        # `make` finds one value for the facts of one subject
        if " ".join(other.subject.split()) != " ".join(fact.subject.split()):
            message = (
                f"the subject {fact.subject!r} ends with the same text before it as {other.subject!r} at "
                f"{name_of(other)}: both share one key, and one value has to serve both; give them the same subject"
            )
            yield Finding("warning", "shared-key", message, fact.where, fact.id)


def _crowds(facts: Sequence[Fact]) -> Iterator[Finding]:
    counts = Counter(normal(fact.subject) for fact in facts)
    named: set[str] = set()
    for fact in facts:
        subject = normal(fact.subject)
        if counts[subject] > CROWDED_SUBJECT and subject not in named:
            named.add(subject)
            message = (
                f"{counts[subject]:,} facts are about {fact.subject!r}; they share one key, so few of them will hold"
            )
            yield Finding("warning", "crowded", message, fact.where, fact.id)


def _encode(tokenizer: Any, facts: Sequence[Fact]) -> list[Spanned | BadInput]:
    """Every fact's row and its subject's first token, or why it has none: one by one only where all together fails."""
    items = [item_of(fact) for fact in facts]
    rows: list[Spanned | BadInput] = []
    try:
        rows += encode_spans(tokenizer, items)
    except BadInput:
        for item in items:
            try:
                rows += encode_spans(tokenizer, [item])
            except BadInput as error:
                rows.append(error)
    return rows


def _spaced(fact: Fact, between: str, target: str) -> Iterator[Finding]:
    """A warning where the target's tokens, as text, begin with another space than the one that belongs there."""
    found = target[: len(target) - len(target.lstrip())]
    if found != between:
        message = f"{_space_name(between)} belongs between prompt and target, but this tokenizer puts"
        message = f"{message} {_space_name(found)} there"
        yield Finding("warning", "space", f"{message}; the model learns it that way", fact.where, fact.id)


def _space_name(space: str) -> str:
    return {"": "nothing", " ": "a space"}.get(space, repr(space))


def _tokenized(tokenizer: Any, fact: Fact, found: Spanned, lead: int) -> Iterator[Finding]:
    """What only shows in tokens; `lead` is the number of special tokens in front."""

    def find(level: str, code: str, message: str) -> Finding:
        return Finding(level, code, message, fact.where, fact.id)

    row = found.row
    if found.beyond:
        message = f"the subject's last token reaches beyond it, over {cut(found.beyond)!r}"
        yield find("warning", "last-token", f"{message}: other prompts about {cut(fact.subject)!r} have another key")
    starts = row.ids[lead : 2 * lead]
    if lead and starts == row.ids[:lead]:
        yield find("warning", "special-twice", "the prompt begins with the token that the tokenizer puts there itself")
    length = len(row.ids) - row.prompt_len
    if length > LONGEST_TARGET:
        yield find("error", "long-target", f"the target has {length} tokens; at most {LONGEST_TARGET} are learned")
    elif length > WORDY_TARGET:
        yield find("warning", "long-target", f"the target has {length} tokens; a name or a short phrase holds better")
    if row.subject_last == 0:
        message = "the subject is the text's first token, which this model reads unlike all others (no BOS before it)"
        yield find("warning", "first-token", f"{message}; a word before it makes the edit surer")
    unknown = getattr(tokenizer, "unk_token_id", None)
    special = set(getattr(tokenizer, "all_special_ids", ())) - {unknown}
    if unknown is not None and unknown in row.ids[lead:]:
        yield find("warning", "unknown", "the tokenizer does not know some of the characters")
    if special.intersection(row.ids[lead:]):
        yield find("warning", "special", "the text holds one of the tokenizer's special tokens")


class _Pieces:
    """Single tokens as text, each looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}
        # Behind another token, because decoders of SentencePiece's kind drop the first one's space
        self.before = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self.skip = len(self.decode(self.before))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def of(self, ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.known[token] if token in self.known else self.look_up(token) for token in ids)

    def look_up(self, token: int) -> str:
        text = self.decode([*self.before, token])[self.skip :]
        if not text or "\ufffd" in text:  # part of a character
            text = str(self.tokenizer.convert_ids_to_tokens(token))
        self.known[token] = text
        return text
