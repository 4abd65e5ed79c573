"""Questions in a model's own chat form: one turn of a user, as the tokenizer's template writes it, in token rows.

Needs a tokenizer of Hugging Face with a chat template, but imports none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kpatch.errors import BadInput
from kpatch.facts.fact import SLOT
from kpatch.facts.problems import cut
from kpatch.facts.questions import question_about
from kpatch.facts.tokens import Encoded, Written, encode_written

# What is put where a text will be, to see what the template writes around it; no template has reason to change them
_QUESTION, _ANSWER = "kPatch asks Qz7", "kPatch answers Xv4"
_THOUGHT = re.compile(r"[<\[](/?)(?:think|thinking|thought|reasoning)[>\]]", re.IGNORECASE)
_WITHOUT = "ask in another form than the chat form"


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's question, the subject that stands in its {} or is named in it, and the answer that follows, if any.

    Without a subject the question as a whole is the row's subject.
    """

    question: str
    subject: str | None = None
    target: str | None = None


def chat_rows(tokenizer: Any, turns: Sequence[Turn]) -> list[Encoded]:
    """Questions as the chat template puts them, up to where the model answers, and behind that the target, if any.

    All tokens are the template's own: none is put in front, and line ends and spaces at its end stay. The target
    follows as an answer of the model would: with no space, unless the template itself puts one there. White space
    around a question is left out, because many templates do so.

    Raises BadInput for a tokenizer without a chat template, a template that drops or rewrites what the user says or
    that opens a thought, a question that does not name its subject, and where the tokenizer keeps nothing of a
    subject or target.
    """
    template = _Template(tokenizer)
    rows = []
    for turn in turns:
        text, begin, end = _place(turn)
        prompt = template.prompt(text)
        at = len(prompt) - len(template.tail) - len(text)
        target = None if turn.target is None else turn.target.strip()
        rows.append(Written(prompt, at + begin, at + end, target, template.between))
    return encode_written(tokenizer, rows)


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """The ids with which the chat template ends an answer; none where it ends in plain text. Raises as `chat_rows`."""
    return _Template(tokenizer).ends


def _place(turn: Turn) -> tuple[str, int, int]:
    """The question written out, without the white space around it, and its subject's characters [begin, end)."""
    if turn.subject is None:
        text = turn.question.strip()
        if not text:
            raise BadInput("A question is empty")
        return text, 0, len(text)
    subject = turn.subject.strip()
    if not subject:
        raise BadInput("A subject is empty", details=[f"in the question {cut(turn.question)!r}"])
    before, _, behind = question_about(turn.question, subject).strip().partition(SLOT)
    return before + subject + behind, len(before), len(before) + len(subject)


class _Template:
    """What a tokenizer's chat template writes around a question and around its answer.

    `tail` stands between the question and the answer, `between` in front of the answer but not in a prompt, `ends`
    are the ids that close an answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise BadInput(
                "This model has no chat template: it is not made for chat, or the template was left out",
                details=["expected `chat_template` in its tokenizer's files"],
                hint=_WITHOUT,
            )
        whole = self._rendered(_QUESTION)
        _, found, self.tail = whole.rpartition(_QUESTION)
        if not found:
            raise _rewritten(_QUESTION, whole)
        thoughts = list(_THOUGHT.finditer(self.tail))
        if thoughts and not thoughts[-1][1]:
            raise BadInput(
                "This model's chat template opens a thought before every answer, and does not let it be left out",
                details=[f"expected no {thoughts[-1][0]} at the prompt's end", f"found {self.tail[-60:]!r}"],
                hint=f"{_WITHOUT}, or give the tokenizer a template that takes `enable_thinking`",
            )
        self.between, self.ends = self._around_answers(whole)

    def prompt(self, text: str) -> str:
        """The prompt that ends where the model answers `text`. Raises BadInput where `text` does not stand in it."""
        whole = self._rendered(text)
        if not whole.endswith(text + self.tail):
            raise _rewritten(text, whole)
        return whole

    def _rendered(self, text: str, answer: str | None = None) -> str:
        turns = [{"role": "user", "content": text}]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        try:
            # A template that knows nothing of thinking passes over what it is told about it
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=answer is None, enable_thinking=False
                )
            )
        except Exception as error:  # a template is a program that raises what it likes
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise BadInput(
                "This model's chat template takes no plain question",
                details=[cut(reason[0], 200)],
                hint=_WITHOUT,
            ) from error

    def _around_answers(self, whole: str) -> tuple[str, frozenset[int]]:
        try:
            answered = self._rendered(_QUESTION, _ANSWER)
        except BadInput:  # it takes no answers, so it has nothing around them
            return "", frozenset()
        before, found, behind = answered.rpartition(_ANSWER)
        if not found:
            return "", frozenset()
        between = before.removeprefix(whole) if before.startswith(whole) else ""
        ids = self.tokenizer(behind, add_special_tokens=False, verbose=False)["input_ids"]
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        ends = [token for token in ids if token in special][:1]
        return (between if between.isspace() else ""), frozenset(ends)


def _rewritten(text: str, whole: str) -> BadInput:
    return BadInput(
        "This model's chat template drops or rewrites what the user says",
        details=[f"expected {cut(text, 200)!r} before the answer", f"found {cut(whole[-300:], 300)!r}"],
        hint=_WITHOUT,
    )


def can_chat(tokenizer: Any) -> bool:
    """Whether questions can be put in the tokenizer's chat form."""
    return chat_trouble(tokenizer) is None


def chat_trouble(tokenizer: Any) -> str | None:
    """Why no question can be put in the tokenizer's chat form; None where it can."""
    try:
        _Template(tokenizer)
    except BadInput as error:
        return error.message
    return None
