"""MEMIT: values at the top of the layers R, and an update that spreads each fact's residual over them.

Source: Meng et al. 2023 (MEMIT), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.edit.earlier import facts_to_learn_again, keys_to_keep
from kpatch.edit.first_token import Part, key_covariances, split, touched
from kpatch.edit.layer_states import LayerStates
from kpatch.edit.methods import Edit, Inputs, Method
from kpatch.edit.norms import norm_gain, pull_back
from kpatch.edit.presets import PRESETS, MemitHyper
from kpatch.edit.requests import Group, contexts_for, group_facts
from kpatch.edit.solve import KeyCovariance, update
from kpatch.edit.values import Objective
from kpatch.edit.values_cache import find_values
from kpatch.edit.weights import add, restored, stored
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from kpatch.patch.delta import Delta, smaller, total
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.covariance import Covariance, collect


class Memit(Method):
    """MEMIT, with subjects that open their text edited at a layer of their own (`kpatch.edit.first_token`)."""

    name = "memit"
    hyper = MemitHyper
    presets = PRESETS["memit"]
    ranks_share = True

    def layers(self, hyper: MemitHyper) -> tuple[int, ...]:
        return tuple(sorted({*hyper.layers, hyper.first_layer}))

    def edit(self, model: Model, facts: Sequence[Fact], hyper: MemitHyper, inputs: Inputs) -> Edit:
        """Contexts, rows, covariance, values, updates. Raises BadInput for too many facts on one subject."""
        with inputs.report.task("Sampling contexts"):
            contexts = distributed.main_does(
                lambda: contexts_for(model, hyper.lead_ins, hyper.prefixes, hyper.prefix_tokens, inputs.seed)
            )
        again = facts_to_learn_again(inputs.on, facts, inputs.report)
        parts = split(group_facts(model, [*facts, *again], contexts), hyper)
        layers = touched(parts)
        with inputs.timed("covariance"):
            covariance = collect(
                model, layers, corpus=inputs.corpus, tokens=inputs.tokens, seed=inputs.seed, report=inputs.report
            )
        with inputs.timed("values"):
            z = [values_of(model, part, inputs) for part in parts]
        with inputs.timed("update"):
            deltas, keys = update_parts(model, parts, z, covariance, keys_to_keep(inputs.on, facts, layers), inputs)
        return Edit(
            deltas,
            tuple(layers),
            keys,
            torch.cat(z),
            tuple(about for part in parts for about in part.about(len(facts))),
            covariance,
        )


def objective_of(hyper: MemitHyper) -> Objective:
    """What z is optimized for: the settings that decide values, and no others."""
    return Objective(
        layer=max(hyper.layers),
        steps=hyper.steps,
        learning_rate=hyper.learning_rate,
        stop_loss=hyper.stop_loss,
        clamp=hyper.clamp,
        weight_decay=hyper.weight_decay,
        kl=hyper.kl,
    )


def values_of(model: Model, part: Part, inputs: Inputs) -> Tensor:
    """z [n, d] for the groups of a part: those that `inputs` has stored, and new ones for the rest."""
    z = [inputs.stored.get((tuple(sorted(group.facts)), part.hyper.layers)) for group in part.groups]
    missing = [index for index, value in enumerate(z) if value is None]
    groups = [part.groups[index] for index in missing]
    if groups and inputs.stored:
        subjects = ", ".join(group.subject[:40] for group in groups[:3])
        more = f" and {len(groups) - 3} more" if len(groups) > 3 else ""
        inputs.report.note(f"finding a value anew for {subjects}{more}: several patches edit the subject")
    if groups:
        found = find_values(
            model,
            groups,
            objective_of(part.hyper),
            budget=inputs.budget,
            resume=inputs.resume,
            report=inputs.report,
        )
        for index, value in zip(missing, found.z, strict=True):
            z[index] = value
    return torch.stack([value for value in z if value is not None]).float()


def update_parts(
    model: Model,
    parts: Sequence[Part],
    z: Sequence[Tensor],
    covariance: Covariance,
    earlier: Mapping[int, Tensor],
    inputs: Inputs,
) -> tuple[dict[str, Delta], dict[int, Tensor]]:
    """Deltas by weight name and keys [n, f] by layer that carry each part's values z [n, d], part after part.

    `earlier` are keys [f, p] by layer that must go on meaning what they do. The model is left as it was found.
    """
    deltas: dict[str, list[Delta]] = {}
    keys: dict[int, list[Tensor]] = {}
    with restored(model, [model.weight_name(layer) for layer in touched(parts)]):
        for part, values in zip(parts, z, strict=True):
            preserved = {}
            if distributed.is_main():
                preserved = key_covariances(model, part, covariance, earlier, inputs.report)
            found = memit_update(
                model,
                part.groups,
                values,
                preserved,
                part.hyper.layers,
                budget=inputs.budget // 2,
                least_leverage=part.least_leverage,
                report=inputs.report,
            )
            for layer in part.hyper.layers:
                name = model.weight_name(layer)
                deltas.setdefault(name, []).append(found.deltas[name])
                keys.setdefault(layer, []).append(found.keys[layer])
                add(model, name, found.deltas[name])
    return (
        {name: total(several) for name, several in sorted(deltas.items())},
        {layer: torch.cat(several) for layer, several in keys.items()},
    )


@dataclass
class Update:
    """Deltas by weight name, in the orientation in which W is stored, and the keys [n, f] of each layer."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)


def memit_update(
    model: Model,
    groups: Sequence[Group],
    z: Tensor,
    preserved: Mapping[int, KeyCovariance],
    layers: Sequence[int],
    *,
    budget: int,
    least_leverage: float = 0.0,
    report: Reporter = SILENT,
) -> Update:
    """Deltas for every layer of R that carry the groups' values z [n, d]; the model is left as it was found.

    For l in R ascending: K^l under the weights so far, r = (z − h^L) / (L − l + 1), Δ^l from `solve.update`,
    then W^l changes before the next layer is looked at. A key whose leverage q = k^T C^{-1} k is below
    `least_leverage` counts least_leverage / q times: alone it would get no more than q / (1 + q) of its residual.
    Ranks share what is run through the model; rank 0, which alone needs `preserved`, solves.
    """
    layers = sorted(layers)
    last = layers[-1]
    result = Update()
    names = [model.weight_name(layer) for layer in layers]
    with restored(model, names), report.task("Updating layers", len(layers), "layer") as done:
        states = LayerStates(model, groups, budget)
        states.start(layers[0])
        for layer, name, above in zip(layers, names, [*layers[1:], last], strict=True):
            keys, h = states.at(layer, last)  # (n, f), (n, d)
            residual = (z.double() - h.double()) / (last - layer + 1)  # (n, d)
            residual = residual / model.residual_scale(layer)  # what W^l writes joins the stream times this
            if model.family.post_norm:
                residual = _before_norm(model, layer, keys, residual)
            delta = distributed.main_does(partial(_delta, model, layer, keys, residual, preserved, least_leverage))
            result.deltas[name] = delta
            result.keys[layer] = keys
            add(model, name, delta)
            states.advance(layer, above)
            done(1)
    return result


def _delta(
    model: Model,
    layer: int,
    keys: Tensor,
    residual: Tensor,
    preserved: Mapping[int, KeyCovariance],
    least_leverage: float,
) -> Delta:
    """Δ^l for keys [n, f] and residuals [n, d]."""
    scale = _scale(preserved[layer].leverage(keys.T), least_leverage)  # (n, 1)
    left, right = update((keys * scale).T, (residual * scale).T, preserved[layer])
    return smaller(stored(left, right, model.stores_transposed))


def _scale(leverage: Tensor, least: float) -> Tensor:
    """Square roots [n, 1] of the facts' weights in the least-squares problem; leverage [n]."""
    return (least / leverage.clamp(min=1e-12)).clamp(min=1.0).sqrt()[:, None]


def _before_norm(model: Model, layer: int, keys: Tensor, residual: Tensor) -> Tensor:
    """The residual pulled back through the norm between W^l and the residual stream, [n, d]."""
    norm = model.mlp_out(layer)
    device = model.device
    written = model.down(layer)(keys.to(device, model.dtype)).float()  # (n, d)
    gain, eps = norm_gain(norm, model.width, device)
    return pull_back(written.cpu(), residual, gain.cpu(), eps)
