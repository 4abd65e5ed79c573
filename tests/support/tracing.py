"""Facts that a tiny random model knows: whatever it happens to answer."""

from __future__ import annotations

from functools import cache

import torch

from kpatch.facts.fact import Fact, fill
from kpatch.facts.tokens import encode, encode_target
from kpatch.models.model import Model
from tests.support.models import tiny

_PROMPTS = (
    "{} is in",
    "The city of {} lies in",
    "In the garden, {} runs past the mill of",
    "They speak of the old {}",
)
_SUBJECTS = (
    *("Chicago", "the Eiffel Tower", "Leonardo da Vinci", "France", "Mona Lisa", "the sea", "Rome", "Brazil"),
    *("Germany", "Beethoven", "the Colosseum", "Paris", "the United States", "Italy", "a river", "the village"),
)


@cache
def model_of(family: str = "llama") -> Model:
    torch.set_num_threads(1)
    return tiny(family)


@cache
def known_facts(family: str = "llama", most: int = 8) -> tuple[Fact, ...]:
    """The first `most` of what the tiny model of a family knows: few, where a test traces them all."""
    return facts_known_by(model_of(family))[:most]


def facts_known_by(model: Model) -> tuple[Fact, ...]:
    """Facts with the model's own first choice as their object, where that comes back as the same token."""
    found = []
    for prompt in _PROMPTS:
        for subject in _SUBJECTS:
            row = encode(model.tokenizer, prompt, subject)
            with torch.no_grad():
                choice = int(model.net(input_ids=torch.tensor([row.ids])).logits[0, -1].argmax())
            target = model.tokenizer.decode([choice]).strip()
            if target and encode_target(model.tokenizer, fill(prompt, subject), target)[0] == choice:
                found.append(Fact(subject, prompt, target, id=str(len(found))))
    return tuple(found)
