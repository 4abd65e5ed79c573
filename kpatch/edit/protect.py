"""Subjects that a fact file protects: their keys join C, and refinement holds what the model says of them."""

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

    A subject without a prompt stands in several texts and shares its weight among them. Raises BadInput as
    `protected_rows`.
    """
    if not protect:
        return {}
    rows = protected_rows(model, protect, facts)
    weights = [one.weight / len(some) for one, some in zip(protect, rows, strict=True) for _ in some]
    columns = torch.tensor(weights, dtype=torch.float64).sqrt()  # (p,)
    found = keys_of(model, layers, [row for some in rows for row in some])
    return {layer: keys.double().T * columns for layer, keys in found.items()}


def protected_rows(model: Model, protect: Sequence[Protected], facts: Sequence[Fact]) -> list[list[Encoded]]:
    """For each protected subject the texts that it stands in: its prompt's, or up to 16 of the facts' prompts.

    Raises BadInput for one that is the first token of its text: there its key is that of every word.
    """
    own = tuple(dict.fromkeys(text for fact in facts for text in (fact.prompt, *fact.wordings)))
    found = []
    for one in protect:
        prompts = (one.prompt,) if one.prompt else own
        rows = encode_many(model.tokenizer, [Item(prompt, one.subject) for prompt in prompts])
        inside = [row for row in rows if row.subject_last > 0][:_PROMPTS]
        if not inside:
            raise BadInput(
                f"{one.subject!r} cannot be protected where it is the first token of a text",
                hint="give it a `prompt` with words before the subject",
            )
        found.append(inside)
    return found
