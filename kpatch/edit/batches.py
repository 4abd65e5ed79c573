"""How many rows go together: batches of groups of like width, within a memory budget, the same on every run."""

from __future__ import annotations

from collections.abc import Sequence

from kpatch.edit.groups import Group
from kpatch.models.load import Model

DEFAULT_BUDGET = 800_000_000  # bytes of activations


def row_bytes(model: Model, columns: int, prefix: int, layers: int) -> int:
    """What one row of a values batch holds for the backward pass, in bytes.

    About 10 vectors of width d and 4 of width f a layer and column, and the prefix's keys and values.
    """
    size = model.dtype.itemsize
    per_column = layers * (10 * model.width + 4 * model.mlp_width) * size
    return columns * per_column + 2 * prefix * layers * model.width * size


def plan(model: Model, groups: Sequence[Group], layer: int, budget: int = DEFAULT_BUDGET) -> list[list[int]]:
    """Indices of groups, batch by batch: sorted by width, so that little is padded, and filled up to the budget.

    It depends on the groups, the model and the budget only, never on what memory is free at the moment:
    the same inputs are batched alike and give the same bits.
    """
    layers = model.n_layers - layer - 1
    order = sorted(range(len(groups)), key=lambda i: (groups[i].columns, i))
    batches: list[list[int]] = []
    used = 0
    for index in order:
        group = groups[index]
        prefix = max(row.subject_last for row in group.rows)
        vocabulary = (sum(len(r.ids) - r.prompt_len for r in group.rows) + 2) * model.net.config.vocab_size * 4 * 4
        need = (len(group.rows) + 1) * row_bytes(model, group.columns, prefix, layers) + vocabulary
        if not batches or used + need > budget:
            batches.append([])
            used = 0
        batches[-1].append(index)
        used += need
    return batches
