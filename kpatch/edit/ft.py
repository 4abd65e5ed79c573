"""Fine-tuning of one MLP output projection on the facts, done as well as it can be: a baseline to be beaten.

Sources: Meng et al. 2023 (MEMIT), section 5 (FT-W): Adam on one layer, early stopping, weight decay towards the
weights as they were. LocFT-BF ("Fine-tuning Done Right in Model Editing", ICLR 2026): passes over all facts in
shuffled batches, with what ends an answer, at a layer that is searched. With the switches off, FT-W is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.edit.earlier import facts_to_learn_again
from kpatch.edit.ft_layer import find_layer
from kpatch.edit.ft_rows import Check, held_rows, learned_rows, other_rows
from kpatch.edit.ft_tuning import tune
from kpatch.edit.methods import Edit, Inputs, Method
from kpatch.edit.presets import PRESETS, FineTuneHyper
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from kpatch.patch.delta import Delta, Dense, LowRank
from kpatch.reporter import Reporter

_SAME = 1e-6  # singular values below this share of the largest are rounding
_OTHERS = 48  # statements about other subjects that a pass is judged by


class FineTune(Method):
    """Adam on W of one layer, which validation finds where none is named."""

    name = "ft"
    hyper = FineTuneHyper
    presets = PRESETS["ft"]
    one_layer = True

    def choose_layers(self, model: Model, report: Reporter) -> tuple[int, ...]:
        return (distributed.main_does(lambda: find_layer(model, report)),)

    def edit(self, model: Model, facts: Sequence[Fact], hyper: FineTuneHyper, inputs: Inputs) -> Edit:
        """Tune W^l; no keys or values, so the facts can't be solved again."""
        facts = [*facts, *facts_to_learn_again(inputs.on, facts, inputs.report, inputs.gone)]
        with inputs.timed("update"):
            rows = learned_rows(model, facts, hyper)
            check = None
            if hyper.validate:
                held, others = held_rows(model, facts), other_rows(model, facts, _OTHERS)
                check = Check(model, held, others, hyper.layer)
            found = tune(model, rows, hyper, inputs.seed, check, inputs.report)
            return Edit({model.weight_name(hyper.layer): stored_small(found.change)}, hyper.layers)


def stored_small(change: Tensor) -> Delta:
    """A change [rows, cols] as factors where its rank lets them be smaller, else as it is.

    Adam divides every entry's step by its own size, so the rank is full as a rule.
    """
    rows, cols = change.shape
    wide = change.double()
    small = wide @ wide.T if rows <= cols else wide.T @ wide
    values = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()  # singular values, rising
    rank = max(1, int((values > _SAME * values[-1]).sum()))
    if rank * (rows + cols) >= rows * cols:
        return Dense(change.float(), None)
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float())
