"""Contexts x_j: short texts put before a prompt, so that an edit holds wherever the subject stands."""

from __future__ import annotations

import torch

from kpatch.models.load import Model
from kpatch.models.runs import align

_OPENINGS = ("The", "Therefore", "Because", "I", "You")


@torch.no_grad()
def sample_contexts(model: Model, count: int, tokens: int, seed: int) -> tuple[str, ...]:
    """The empty context and `count` texts of `tokens` tokens sampled from the model (the five likeliest at each step).

    Deterministic in the seed: draws come from a generator of their own, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = [list(model.tokenizer(_OPENINGS[index % len(_OPENINGS)]).input_ids) for index in range(count)]
    rows = [list(start) for start in starts]
    for _ in range(tokens if rows else 0):
        batch = align(rows, [len(row) - 1 for row in rows], model.pad_id, model.device)  # all end in the last column
        out = model.net(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        logits = out.logits[:, -1].float().cpu()  # (count, V)
        logits[:, model.tokenizer.all_special_ids] = -torch.inf  # an end-of-text inside a sentence helps nobody
        top = logits.topk(5)
        picks = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        for row, token in zip(rows, top.indices.gather(1, picks)[:, 0].tolist(), strict=True):
            row.append(token)
    return ("", *(_as_lead(model.tokenizer.decode(row, skip_special_tokens=True)) for row in rows))


def _as_lead(text: str) -> str:
    """A sampled text as one sentence that a prompt can follow."""
    return " ".join(text.replace("{", " ").replace("}", " ").split()).rstrip(".,;:- ") + "."
