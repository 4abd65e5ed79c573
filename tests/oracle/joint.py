"""Joint writes one subject at a time, straight from the equations: slow, without padding, batches or caches.

Every row goes through the network's own forward by itself; hooks alone read and change what flows. With δ^l added to
what W^l puts out at the subject's last token, for all l of R:

    loss(δ) = mean over rows and target tokens of −log P + kl · Σ P_now (log P_now − log P_before) on "{subject} is a"
    Adam with a step of learning_rate · s^l / √d a coordinate, and ‖δ^l‖ ≤ clamp · s^l
    s^l = ‖h^L‖ / |R| over the layer's scale or the token's gate; ‖y^l‖ where a norm follows W^l

The target of layer l is the state that leaves it with all δ in place (y^l + δ^l where a norm or a gate follows). For l
rising, with the whole of what is missing under the weights so far, Δ^l is what minimizes

    Σ_i Σ_j w_ij ‖Δ k_ij − r_i‖² + tr(Δ C Δ^T),   so   Δ = Σ_i r_i (Σ_j w_ij k_ij)^T (C + Σ_ij w_ij k_ij k_ij^T)^{-1}

over the keys k_ij of all rows of a subject: the bare prompts share half of the weight, the contexts the other half.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kpatch.facts.tokens import Encoded, encode
from kpatch.models.model import Model
from tests.oracle import memit as paper
from tests.oracle.memit import Prompt

if TYPE_CHECKING:
    from kpatch.edit.presets import MemitHyper


@contextmanager
def writing(model: Model, row: Encoded, deltas: Mapping[int, Tensor]) -> Iterator[dict[int, Tensor]]:
    """While open, W^l puts out δ^l more at the row's subject; the dict has what it put out itself there."""
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer, delta in deltas.items():

            def change(out: Tensor, layer: int = layer, delta: Tensor = delta) -> Tensor:
                flat = out.reshape(len(row.ids), -1)
                seen[layer] = flat[row.subject_last].detach().clone()
                here = torch.zeros(len(row.ids), 1)
                here[row.subject_last] = 1
                return (flat + here * delta).reshape(out.shape)

            stack.enter_context(paper.output_changed(model.down(layer), change))
        yield seen


def log_probabilities(model: Model, row: Encoded, deltas: Mapping[int, Tensor]) -> Tensor:
    """log P [T, V] after each token of the row, under the writes."""
    with writing(model, row, deltas):
        return paper.forward(model, row.ids).log_softmax(-1)


@torch.no_grad()
def sizes(model: Model, row: Encoded, layers: Sequence[int]) -> dict[int, float]:
    """s^l of every layer of R for the subject whose bare prompt is `row`."""
    if model.family.post_norm:
        with writing(model, row, dict.fromkeys(layers, torch.zeros(model.width))) as seen:
            paper.forward(model, row.ids)
        return {layer: float(seen[layer].norm()) for layer in layers}
    size = float(paper.state(model, row, max(layers)).norm()) / len(layers)
    gates = {
        layer: gate(model, row, layer) if gated(model, layer) else paper.mlp_scale(model, layer) for layer in layers
    }
    return {layer: size / abs(gates[layer]) for layer in layers}


def gated(model: Model, layer: int) -> bool:
    return hasattr(getattr(model.layer(layer), "mlp", None), "shared_expert_gate")


@torch.no_grad()
def gate(model: Model, row: Encoded, layer: int) -> float:
    """What the shared expert's output is multiplied by at the row's subject: a sigmoid of what enters the experts."""
    module, seen = model.layer(layer).mlp.shared_expert_gate, []
    handle = module.register_forward_hook(lambda _, args, out: seen.append(out.reshape(len(row.ids), -1)))
    try:
        paper.forward(model, row.ids)
    finally:
        handle.remove()
    return float(seen[0][row.subject_last].sigmoid())


def find_writes(
    model: Model,
    contexts: Sequence[str],
    prompts: Sequence[Prompt],
    hyper: MemitHyper,
    others: Sequence[str] = (),
) -> tuple[dict[int, Tensor], list[float]]:
    """δ^l [d] by layer of one subject, and the loss of each iteration without its drift.

    The drift is the mean over "{} is a" and `others`, questions with {} for the subject.
    """
    rows = paper.rows_for(model, contexts, prompts)
    bare = paper.rows_for(model, [""], prompts[:1])[0]
    drifts = [encode(model.tokenizer, text, prompts[0][1]) for text in ("{} is a", *others)]
    size = sizes(model, bare, hyper.layers)
    deltas = {layer: torch.zeros(model.width, requires_grad=True) for layer in hyper.layers}
    with torch.no_grad():
        before = [log_probabilities(model, row, deltas)[-1] for row in drifts]
    adam = torch.optim.Adam(
        [
            {"params": [delta], "lr": hyper.learning_rate * size[layer] / model.width**0.5}
            for layer, delta in deltas.items()
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    losses: list[float] = []
    for iteration in range(1, hyper.steps + 1):
        adam.zero_grad()
        nll = torch.zeros(())
        for row in rows:
            log_p = log_probabilities(model, row, deltas)
            target = row.ids[row.prompt_len :]
            for offset, token in enumerate(target):
                nll = nll - log_p[row.prompt_len - 1 + offset, token] / len(target) / len(rows)
        kl = torch.zeros(())
        for row, then in zip(drifts, before, strict=True):
            now = log_probabilities(model, row, deltas)[-1]
            kl = kl + (now.exp() * (now - then)).sum() / len(drifts)
        losses.append(nll.item())
        if losses[-1] < hyper.stop_loss or iteration == hyper.steps:
            break
        (nll + hyper.kl * kl).backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            for layer, delta in deltas.items():
                radius = hyper.clamp * size[layer] * (2 if model.family.post_norm else 1)
                if delta.norm() > radius:
                    delta.mul_(radius / delta.norm())
    return {layer: delta.detach() for layer, delta in deltas.items()}, losses


@torch.no_grad()
def targets(model: Model, row: Encoded, deltas: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """What each layer of R is asked for, [d], given the writes; `row` is the bare prompt."""
    with writing(model, row, deltas) as seen:
        states = {layer: paper.state(model, row, layer) for layer in deltas}
    behind = {layer for layer in deltas if model.family.post_norm or gated(model, layer)}
    return {layer: seen[layer] + delta if layer in behind else states[layer] for layer, delta in deltas.items()}


def weighed_keys(
    model: Model, contexts: Sequence[str], prompts: Sequence[Prompt], layer: int
) -> list[tuple[float, Tensor]]:
    """w_j and k_j [f] of every row of one subject; the bare prompts and the contexts have half of the weight each."""
    kinds = [[context for context in contexts if (context == "") == bare] for bare in (True, False)]
    rows = [paper.rows_for(model, kind, prompts) for kind in kinds if kind]
    return [(1 / len(rows) / len(alike), paper.key(model, row, layer).double()) for alike in rows for row in alike]


def joint(
    model: Model,
    contexts: Sequence[str],
    facts: Iterable[Prompt],
    hyper: MemitHyper,
    covariances: Mapping[int, Tensor],
    wanted: Sequence[Mapping[int, Tensor]],
) -> dict[str, Tensor]:
    """Weight name → Δ [out, in] float64 for every layer of R; `model` is left as it is.

    `covariances` are C [f, f] by layer, λ included; `wanted` are the targets of every subject, as `by_subject` orders.
    """
    work = Model(net=copy.deepcopy(model.net), tokenizer=model.tokenizer, family=model.family)
    groups = paper.by_subject(facts)
    bare = [paper.rows_for(work, [""], group[:1])[0] for group in groups]
    deltas: dict[str, Tensor] = {}
    for layer in sorted(hyper.layers):
        normal, right = covariances[layer].clone(), torch.zeros(model.width, model.key_width(layer)).double()
        for group, row, target in zip(groups, bare, wanted, strict=True):
            weighed = weighed_keys(work, contexts, group, layer)
            k = torch.stack([share * key for share, key in weighed]).sum(0)
            with torch.no_grad():
                if model.family.post_norm or gated(model, layer):
                    lacking = target[layer] - work.down(layer)(k.to(work.dtype))
                else:
                    lacking = (target[layer] - paper.state(work, row, layer)) / paper.mlp_scale(work, layer)
            for share, key in weighed:
                normal = normal + share * torch.outer(key.double(), key.double())
                right = right + share * torch.outer(lacking.double(), key.double())
        delta = right @ torch.linalg.inv(normal)  # [d, f]
        with torch.no_grad():
            weight = work.weight(layer)
            weight.copy_((weight.double() + (delta.T if model.stores_transposed else delta)).to(weight.dtype))
        deltas[model.weight_name(layer)] = delta
    return deltas
