"""Subjects that a fact file protects: their keys join C, so that what they mean to the model stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.facts.fact import Fact, Protected
from kpatch.facts.tokens import Encoded, Item, encode_many
from kpatch.models.model import Model
from kpatch.stats.subject_keys import keys_of

_PROMPTS = 16  # of the facts' own, where a protected subject names none


def protected_keys(
    model: Model, protect: Sequence[Protected], facts: Sequence[Fact], layers: Sequence[int]
) -> dict[int, Tensor]:
    """Columns √w k [f, p] by layer, so that Σ w k k^T is what they add to C.

    A subject without a prompt stands in up to 16 of the facts' prompts and shares its weight among them.
    Raises BadInput for one that is the first token of its text: there its key is that of every word.
    """
    if not protect:
        return {}
    own = tuple(dict.fromkeys(text for fact in facts for text in (fact.prompt, *fact.wordings)))
    items: list[Encoded] = []
    weights: list[float] = []
    for one in protect:
        prompts = (one.prompt,) if one.prompt else own
        rows = encode_many(model.tokenizer, [Item(prompt, one.subject) for prompt in prompts])
        inside = [row for row in rows if row.subject_last > 0][:_PROMPTS]
        if not inside:
            raise BadInput(
                f"{one.subject!r} cannot be protected where it is the first token of a text",
                hint="give it a `prompt` with words before the subject",
            )
        items += inside
        weights += [one.weight / len(inside)] * len(inside)
    columns = torch.tensor(weights, dtype=torch.float64).sqrt()  # (p,)
    return {layer: keys.double().T * columns for layer, keys in keys_of(model, layers, items).items()}
