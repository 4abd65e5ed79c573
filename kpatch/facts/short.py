"""Facts and neighbors in one line: "[Eiffel Tower] was designed by -> Le Corbusier", "The Louvre is in -> Paris"."""

from __future__ import annotations

import re

from kpatch.facts.fact import SLOT, Neighbor
from kpatch.facts.join import trimmed

ARROW = "->"
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")


def parse_fact(text: str) -> tuple[str, str, str]:
    """(subject, prompt with {}, target). Raises ValueError, whose text is a message for the user."""
    prompt, target = _split(text)
    if SLOT in prompt:
        raise ValueError("the short form names its subject in [brackets]; it takes no {}")
    found = _BRACKETS.findall(prompt)
    if len(found) != 1 or prompt.count("[") != 1 or prompt.count("]") != 1:
        count = "none" if not found else "other brackets too" if len(found) == 1 else str(len(found))
        raise ValueError(f"the short form needs exactly one subject in [brackets]; found {count}")
    return found[0].strip(), _BRACKETS.sub(SLOT, prompt, count=1), target


def parse_neighbor(text: str) -> Neighbor:
    """A neighbor from "prompt -> target", or from a prompt alone. Raises ValueError with a message for the user."""
    if ARROW not in text:
        return Neighbor(trimmed(text))
    prompt, target = _split(text)
    return Neighbor(prompt, target)


def _split(text: str) -> tuple[str, str]:
    parts = [trimmed(part) for part in text.split(ARROW)]
    if len(parts) != 2:
        found = "none" if len(parts) == 1 else str(len(parts) - 1)
        raise ValueError(f"expected one '{ARROW}' between prompt and target, found {found}")
    prompt, target = parts[0], parts[1].strip()
    if not prompt.strip() or not target:
        raise ValueError(f"nothing stands {'before' if target else 'behind'} the '{ARROW}'")
    return prompt, target
