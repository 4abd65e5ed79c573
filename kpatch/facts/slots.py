"""The {} in a text, where the subject goes: what is wrong where there is none, or where its braces are doubled."""

from __future__ import annotations

import json
import re

from kpatch.facts.fact import SLOT
from kpatch.facts.problems import cut

_OTHER_SLOT = re.compile(r"\{\s*\w*\s*\}|%s")
_DOUBLED = re.compile(r"\{\{+\}\}+")


def doubled(text: str) -> str | None:
    """What is wrong with {{}}, as template languages write braces; None where the text has none."""
    found = _DOUBLED.search(text)
    if found is None:
        return None
    return f"{found[0]} would be the subject in braces of its own; write {_quoted(_DOUBLED.sub(SLOT, text))}"


def without_slot(text: str, subject: str) -> str:
    """Why a prompt without {} is wrong, with the wording that was probably meant."""
    place = text.casefold().find(subject.casefold()) if subject else -1
    # Folding may change lengths (ß); then only the exact wording is proposed
    if place >= 0 and text[place : place + len(subject)].casefold() == subject.casefold():
        meant = text[:place] + SLOT + text[place + len(subject) :]
        return f"the prompt has no {{}}; write {_quoted(meant)}"
    other = _OTHER_SLOT.search(text)
    if other:
        return f"the prompt has no {{}}; write {_quoted(_OTHER_SLOT.sub(SLOT, text, count=1))}"
    if not subject:
        return "the prompt has no {}; write {} where the subject goes"
    return (
        f"the prompt has no {{}} and does not contain the subject {cut(subject)!r}; write {{}} where the subject goes"
    )


def _quoted(text: str) -> str:
    """As it can be pasted into YAML or JSON."""
    return json.dumps(cut(text, 200), ensure_ascii=False)
