"""ROME: facts one after another, each a rank-one change of one layer that sends its key to its value.

Source: Meng et al. 2022 (ROME), section 3.1 and appendix E.5. One averaged key k* stands everywhere in the formula:
the authors' code divides by another one, which now and then gives an update that disables the model (2403.07175).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.edit.earlier import facts_to_learn_again
from kpatch.edit.methods import Edit, Inputs, Method
from kpatch.edit.norms import before_norm, require_one_way
from kpatch.edit.presets import PRESETS, RomeHyper
from kpatch.edit.requests import Group, contexts_for
from kpatch.edit.solve import KeyCovariance, key_covariance
from kpatch.edit.values import Objective, optimize
from kpatch.edit.weights import restored, stored
from kpatch.facts.fact import Fact
from kpatch.facts.tokens import Item, encode_many, item_of
from kpatch.models.model import Model
from kpatch.models.partial_forward import align, record
from kpatch.patch.delta import Dense, LowRank, concat, patched_weight, smaller
from kpatch.reporter import SILENT, Advance, Reporter
from kpatch.stats.covariance import collect


@dataclass(frozen=True)
class Edited:
    """One fact's edit: its key k* [f], its value v* [d] (what W k* shall be), and Δ = left @ right [d, f]."""

    key: Tensor
    value: Tensor
    left: Tensor
    right: Tensor


class Rome(Method):
    """ROME at one layer, fact after fact."""

    name = "rome"
    hyper = RomeHyper
    presets = PRESETS["rome"]
    one_layer = True

    def require(self, model: Model, layers: Sequence[int]) -> None:
        require_one_way(model, layers)

    def edit(self, model: Model, facts: Sequence[Fact], hyper: RomeHyper, inputs: Inputs) -> Edit:
        """C = E[k k^T] of the layer, contexts, then one rank-one change a fact; rank n in all.

        Earlier facts about the same subjects are written again, each before the new facts.
        """
        report = inputs.report
        again = facts_to_learn_again(inputs.on, facts, report, inputs.gone)
        with inputs.timed("covariance"):
            covariance = collect(
                model, hyper.layers, corpus=inputs.corpus, tokens=inputs.tokens, seed=inputs.seed, report=report
            )
            preserved = key_covariance(hyper.layer, covariance.moments[hyper.layer].mean(), 1.0, None, report)
        with report.task("Sampling contexts"):
            contexts = rome_contexts(model, hyper, inputs.seed)
        with inputs.timed("values"):
            edits = edit_all(model, [*again, *facts], hyper, contexts, preserved, report)
        owns = [*([] for _ in again), *([index] for index in range(len(facts)))]
        return Edit(
            {model.weight_name(hyper.layer): smaller(together(model, edits))},
            hyper.layers,
            {hyper.layer: torch.stack([edit.key for edit in edits])},
            torch.stack([edit.value for edit in edits]),
            tuple({"facts": own, "layers": [hyper.layer]} for own in owns) if again else (),
            covariance,
        )


def rome_contexts(model: Model, hyper: RomeHyper, seed: int) -> tuple[str, ...]:
    """The empty context and texts of two lengths sampled from the model."""
    half = hyper.prefixes // 2
    return (
        *contexts_for(model, 0, hyper.prefixes - half, hyper.short, seed),
        *contexts_for(model, 0, half, hyper.long, seed + 1)[1:],
    )


def edit_all(
    model: Model,
    facts: Sequence[Fact],
    hyper: RomeHyper,
    contexts: Sequence[str],
    preserved: KeyCovariance,
    report: Reporter = SILENT,
) -> list[Edited]:
    """Edit the facts one after another, each in the model as those before it left it, and undo them all."""
    edits = []
    with (
        restored(model, [model.weight_name(hyper.layer)]),
        report.task("Editing facts", len(facts) * hyper.steps, "step") as advance,
    ):
        running = Running(model, hyper.layer)
        for fact in facts:
            edits.append(edit(model, fact, hyper, contexts, preserved, advance))
            running.add(edits[-1])
    return edits


class Running:
    """W^l while facts are added to it: round(base + Σ Δ), summed in float64, so that rounding does not add up."""

    def __init__(self, model: Model, layer: int) -> None:
        self.model, self.weight = model, model.weight(layer)
        self.base = self.weight.detach().clone()
        self.change = torch.zeros(self.base.shape, dtype=torch.float64)

    @torch.no_grad()
    def add(self, edit: Edited) -> None:
        delta = edit.left @ edit.right
        self.change += delta.T if self.model.stores_transposed else delta
        self.weight.copy_(patched_weight(self.base, [Dense(self.change)]))


def edit(
    model: Model,
    fact: Fact,
    hyper: RomeHyper,
    contexts: Sequence[str],
    preserved: KeyCovariance,
    advance: Advance = lambda amount: None,
) -> Edited:
    """One fact's rank-one update: Δ = (v* − W k*) u^T / (u^T k*) with u = C^{-1} k*, so that (W + Δ) k* = v*."""
    group = group_of(model, fact, contexts)
    key, state = observe(model, group, hyper.layer)
    down, out = model.down(hyper.layer), model.mlp_out(hyper.layer)
    with torch.no_grad():
        written = down(key.to(model.device, model.dtype)[None])  # (1, d)
        size, length = float(out(written).norm() if model.family.post_norm else written.norm()), float(state.norm())
        size *= abs(model.residual_scale(hyper.layer))
    # δ joins the residual stream wherever it is added to what the MLP puts out, so values are found as for MEMIT;
    # but its decay and its bound are measured by m, not by h.
    goal = Objective(
        layer=hyper.layer,
        steps=hyper.steps,
        learning_rate=hyper.learning_rate,
        stop_loss=hyper.stop_loss,
        clamp=hyper.clamp * size / length,
        weight_decay=hyper.weight_decay * (length / size) ** 2,
        kl=hyper.kl,
    )
    shift = (optimize(model, [group], goal, advance).values[0, 0] - state).double()[None]  # (1, d)
    shift = shift / model.residual_scale(hyper.layer)
    written = written.cpu().double()
    shift = before_norm(model, hyper.layer, written, shift)
    direction = preserved.inverse_times(key[:, None])[:, 0]  # (f,)
    right = direction / (direction @ key)
    return Edited(key, (written + shift)[0], shift.T, right[None])


def group_of(model: Model, fact: Fact, contexts: Sequence[str]) -> Group:
    """One fact in every context, and its drift row."""
    items = [item_of(fact, context and context + " ") for context in contexts]
    *rows, drift = encode_many(model.tokenizer, [*items, Item("{} is a", fact.subject)])
    return Group(fact.subject, (0,), tuple(rows), tuple(range(len(rows))), (drift,))


@torch.no_grad()
def observe(model: Model, group: Group, layer: int) -> tuple[Tensor, Tensor]:
    """k* [f] float64, the mean over contexts of what enters W^l at the subject, and h^l [d] of the bare prompt."""
    ids = [row.ids[: row.subject_last + 1] for row in group.rows]
    calls = record(model, align(ids, [len(row) - 1 for row in ids], model.pad_id, model.device))
    hidden = calls.run(calls.start, 0, layer)
    out, keys = calls.run_with_key(hidden, layer)
    return keys[:, -1].double().mean(0).cpu(), out[group.bare, -1].float().cpu()


def together(model: Model, edits: Sequence[Edited]) -> LowRank:
    """Σ Δ of all edits in the orientation in which W is stored: rank n."""
    return concat([stored(edit.left, edit.right, model.stores_transposed) for edit in edits])
