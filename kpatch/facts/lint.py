"""What a careful reader would say about checked facts; with a tokenizer, also how a model will read them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kpatch.errors import BadInput
from kpatch.facts.conflicts import normal
from kpatch.facts.fact import SLOT, Fact, FactFile
from kpatch.facts.join import without_spaces_behind
from kpatch.facts.tokens import LONGEST_TARGET, Encoded, encode_spans, lead_ids, require_fast

WORDY_TARGET = 20  # tokens
CROWDED_SUBJECT = 10  # facts
_LOADED = re.compile(r"(?P<where>.*?:\d+:\d+): (?P<message>.*)", re.DOTALL)
# Zero-width joiners are part of emoji and of Indic and Persian spelling
_INVISIBLE = re.compile("[\u00a0\u00ad\u200b\u200e\u200f\u2028-\u202f\u2060-\u2069\ufeff]")


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

    `subject_last` is the index of the subject's last token in the whole row, special tokens counted.
    """

    fact: str
    where: str
    subject: tuple[str, ...]
    target: tuple[str, ...]
    subject_last: int


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


def lint(file: FactFile, tokenizer: Any = None) -> LintReport:
    """Findings about the facts of `file`. Raises BadInput for a slow tokenizer, and nothing else."""
    findings = [_loaded(warning) for warning in file.warnings]
    for fact in file.facts:
        findings += _words(fact)
    findings += _crowds(file.facts)
    if tokenizer is None:
        return LintReport(len(file.facts), tuple(findings))
    require_fast(tokenizer)
    lead, pieces = len(lead_ids(tokenizer)), _Pieces(tokenizer)
    tokens = []
    for fact, found in zip(file.facts, _encode(tokenizer, file.facts), strict=True):
        if isinstance(found, BadInput):
            message = "; ".join((found.message, *found.details))
            findings.append(Finding("error", "untokenizable", message, fact.where, fact.id))
            continue
        row, first = found
        last = row.subject_last
        subject, target = pieces.of(row.ids[first : last + 1]), pieces.of(row.ids[row.prompt_len :])
        tokens.append(Tokens(fact.id, fact.where, subject, target, last))
        findings += _tokenized(tokenizer, fact, row, lead)
    return LintReport(len(file.facts), tuple(findings), tuple(tokens))


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
    if "  " in fact.prompt.strip():
        yield warn("double-space", "the prompt has two spaces in a row")
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
        hidden = _INVISIBLE.search(text)
        if hidden:
            yield warn("invisible", f"the {key} holds the invisible character U+{ord(hidden.group()):04X}")
        if not text.isascii() and not unicodedata.is_normalized("NFC", text):
            yield warn("decomposed", f"the {key} has accents as characters of their own, which models read otherwise")


def _crowds(facts: Sequence[Fact]) -> Iterator[Finding]:
    counts = Counter(normal(fact.subject) for fact in facts)
    told: set[str] = set()
    for fact in facts:
        subject = normal(fact.subject)
        if counts[subject] > CROWDED_SUBJECT and subject not in told:
            told.add(subject)
            message = (
                f"{counts[subject]:,} facts are about {fact.subject!r}; they share one key, so few of them will hold"
            )
            yield Finding("warning", "crowded", message, fact.where, fact.id)


def _encode(tokenizer: Any, facts: Sequence[Fact]) -> list[tuple[Encoded, int] | BadInput]:
    """Every fact's row and its subject's first token, or why it has none: one by one only where all together fails."""
    items = [(fact.prompt, fact.subject, fact.target, "") for fact in facts]
    rows: list[tuple[Encoded, int] | BadInput] = []
    try:
        rows += encode_spans(tokenizer, items)
    except BadInput:
        for item in items:
            try:
                rows += encode_spans(tokenizer, [item])
            except BadInput as error:
                rows.append(error)
    return rows


def _tokenized(tokenizer: Any, fact: Fact, row: Encoded, lead: int) -> Iterator[Finding]:
    """What only shows in tokens; `lead` is the number of special tokens in front."""

    def find(level: str, code: str, message: str) -> Finding:
        return Finding(level, code, message, fact.where, fact.id)

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
