"""Contexts x_j: short texts put before a prompt, so that an edit holds wherever the subject stands."""

from __future__ import annotations

import torch

from kpatch.errors import BadInput
from kpatch.models.load import Model
from kpatch.models.runs import align

# Texts of several kinds that any prompt can follow; --set lead_ins takes the first of them
LEAD_INS = (
    "As everyone knows,",
    "In the news today:",
    "Here is a simple fact.",
    "I read in a book that",
    "Many people say:",
)
_OPENINGS = ("The", "Therefore", "Because", "I", "You")


def contexts_for(model: Model, lead_ins: int, count: int, tokens: int, seed: int) -> tuple[str, ...]:
    """The empty context, the first lead-ins, and `count` texts of `tokens` tokens sampled from the model.

    Each token is one of the five likeliest. Deterministic in the seed: draws come from a generator of their own.
    Raises BadInput for more lead-ins than there are.
    """
    if lead_ins > len(LEAD_INS):
        raise BadInput(f"--set lead_ins={lead_ins} is more than there are", details=[f"expected 0 to {len(LEAD_INS)}"])
    return ("", *LEAD_INS[:lead_ins], *(_sampled(model, count, tokens, seed) if count else ()))


@torch.no_grad()
def _sampled(model: Model, count: int, tokens: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    starts = [list(model.tokenizer(_OPENINGS[index % len(_OPENINGS)]).input_ids) for index in range(count)]
    rows = [list(start) for start in starts]
    for _ in range(tokens):
        batch = align(rows, [len(row) - 1 for row in rows], model.pad_id, model.device)  # all end in the last column
        out = model.net(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        logits = out.logits[:, -1].float().cpu()  # (count, V)
        logits[:, model.tokenizer.all_special_ids] = -torch.inf  # an end-of-text inside a sentence helps nobody
        top = logits.topk(5)
        picks = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        for row, token in zip(rows, top.indices.gather(1, picks)[:, 0].tolist(), strict=True):
            row.append(token)
    return [_as_lead(model.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def _as_lead(text: str) -> str:
    """A sampled text as one sentence that a prompt can follow."""
    return " ".join(text.replace("{", " ").replace("}", " ").split()).rstrip(".,;:- ") + "."
