"""Other words for a prompt by its grammar alone, where no library knows what it says. English only.

"The patron saint of {} is" has the same answer as "{}'s patron saint is", and "What is the patron saint of {}?" asks
for it; a prompt that asks so is said in both ways. A prompt of another build can still be put as a task: "Complete
this sentence: {} was founded by".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kpatch.facts.fact import SLOT
from kpatch.facts.statements import statements_of

_SUBJECT = r"(?P<subject>(?:(?:the|an?) )?\{\})"
_REST = r"(?P<rest>(?:is|was|are|were)\b[^{}.,:;?!]*)"
_OF = re.compile(rf"\A(?:the )?(?P<noun>[^\W\d_][^{{}}.,:;?!]*?) of {_SUBJECT} {_REST}\Z", re.IGNORECASE)
_HAS = re.compile(rf"\A{_SUBJECT}['’]s (?P<noun>[^\W\d_][^{{}}.,:;?!]*?) {_REST}\Z", re.IGNORECASE)
_ASKS_OF = re.compile(
    rf"\A(?:what|which|who) (?P<rest>is|was|are|were) (?:the )?(?P<noun>[^\W\d_][^{{}}.,:;?!]*?) of {_SUBJECT}\?\Z",
    re.IGNORECASE,
)
_ASKS_HAS = re.compile(
    rf"\A(?:what|which|who) (?P<rest>is|was|are|were) {_SUBJECT}['’]s (?P<noun>[^\W\d_][^{{}}.,:;?!]*?)\?\Z",
    re.IGNORECASE,
)
# Openings that make "X of {}" something else than a thing that the subject has
_OPENING = re.compile(r"\A(?:an?|one|two|some|many|most|all|each|because|in|on|at|by|for|from|with)\b", re.IGNORECASE)
_ENGLISH = re.compile(r"\b(?:the|of|is|was|are|were|has|had|by|with|from|for|who|which)\b", re.IGNORECASE)
# One line of plain words that goes on: no chat prompt written out, no question, no quotation that has begun
_UNFINISHED = re.compile(r"[^\n<>\[\]|\"“”?!:;]*[^\W_]['’]?\Z")
_LONGEST = 200  # characters


@dataclass(frozen=True, slots=True)
class _Has:
    """What a prompt says or asks of a thing that a subject has: "the patron saint of {} is" → patron saint, {}, is."""

    noun: str
    subject: str
    rest: str
    said: tuple[bool, bool]  # with "of", with "'s": the forms of a statement that the prompt has already


def reworded(prompt: str) -> tuple[str, ...]:
    """Other wordings with one {} of a prompt that says what something of the subject is, or asks for anything.

    Those of a question are statements, the plainest first. Any other prompt has none.
    """
    found = _has(prompt)
    if found is None:
        return statements_of(prompt)
    subject, noun, rest = found.subject, found.noun, found.rest
    owner = subject[0].upper() + subject[1:]
    statements = (f"The {noun} of {subject} {rest}", f"{owner}'s {noun} {rest}")
    return (
        *(statement for statement, said in zip(statements, found.said, strict=True) if not said),
        f"When it comes to {subject}, the {noun} {rest}",
        f"People who know {subject} say that its {noun} {rest}",
    )


def asked(prompt: str) -> str | None:
    """A question, or a task, with {} for the subject, whose answer is the prompt's; None for no English sentence."""
    text, found = prompt.strip(), _has(prompt)
    if (found is not None and not any(found.said)) or statements_of(text):
        return text
    if found is not None and " " not in found.rest:
        return f"What {found.rest} the {found.noun} of {found.subject}?"
    if len(text) > _LONGEST or not _UNFINISHED.fullmatch(text) or not _ENGLISH.search(text.replace(SLOT, " ")):
        return None
    return f"Complete this sentence: {text}"


def _has(prompt: str) -> _Has | None:
    text = prompt.strip()
    of, has = _OF.match(text), _HAS.match(text)
    found = of or has or _ASKS_OF.match(text) or _ASKS_HAS.match(text)
    if len(text) > _LONGEST or found is None or not found["rest"][-1].isalnum():
        return None
    noun, subject = found["noun"], found["subject"]
    if _OPENING.match(noun) or " of " in noun:  # the mother of the king of {} is not {}'s
        return None
    said, rest = (found is of, found is has), found["rest"]
    return _Has(noun, subject[0].lower() + subject[1:], rest if any(said) else rest.lower(), said)
