"""ROME one fact at a time, straight from the equations: δ is added to the MLP's output itself, row by row.

Source: Meng et al. 2022 (ROME), sections 3.1 and E.5, with one averaged key everywhere (2403.07175). Nothing here
uses kpatch.edit or partial runs.

Dimension letters: d width, f MLP width, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kpatch.facts.tokens import Encoded, encode
from kpatch.models.model import Model
from tests.oracle.memit import Prompt, forward, key, mlp_scale, nearest_on_norm, norm_parts, output_changed, rows_for

if TYPE_CHECKING:
    from kpatch.edit.presets import RomeHyper


def next_token_log_probabilities(model: Model, row: Encoded, layer: int, delta: Tensor) -> Tensor:
    """log P [T, V] after each token of the row, with the residual stream moved by δ where m^l joins it."""
    delta = delta / mlp_scale(model, layer)
    here = torch.zeros(len(row.ids), 1, device=model.device, dtype=delta.dtype)
    here[row.subject_last] = 1
    with output_changed(model.mlp_out(layer), lambda out: out + (here * delta).to(out.dtype)):
        return forward(model, row.ids).log_softmax(-1)


def mean_key(model: Model, contexts: Sequence[str], fact: Prompt, layer: int) -> Tensor:
    """k* [f]: the mean over contexts of the input of W^l at the subject's last token, float64."""
    return torch.stack([key(model, row, layer).double() for row in rows_for(model, contexts, [fact])]).mean(0)


@torch.no_grad()
def written(model: Model, layer: int, k: Tensor) -> tuple[Tensor, Tensor]:
    """What W^l puts out at k [f] and what of it joins the residual stream, each [d]."""
    y: Tensor = model.down(layer)(k.to(model.dtype)[None])
    m: Tensor = model.mlp_out(layer)(y) if model.family.post_norm else y
    return y[0], m[0]


def find_shift(
    model: Model, contexts: Sequence[str], fact: Prompt, hyper: RomeHyper, m: Tensor
) -> tuple[Tensor, list[float]]:
    """δ [d] that makes the target likely, and the loss of each iteration; bounds and decay are measured by ‖m‖."""
    rows = rows_for(model, contexts, [fact])
    drift = encode(model.tokenizer, "{} is a", fact[1])
    delta = torch.zeros_like(m).requires_grad_()
    with torch.no_grad():
        before = next_token_log_probabilities(model, drift, hyper.layer, delta)[drift.prompt_len - 1]
    adam = torch.optim.Adam([delta], lr=hyper.learning_rate)
    losses: list[float] = []
    for iteration in range(1, hyper.steps + 1):
        adam.zero_grad()
        loss = hyper.weight_decay * delta.norm() / m.norm() ** 2
        for row in rows:
            log_p = next_token_log_probabilities(model, row, hyper.layer, delta)
            target = row.ids[row.prompt_len :]
            for offset, token in enumerate(target):
                loss = loss - log_p[row.prompt_len - 1 + offset, token] / len(target) / len(rows)
        now = next_token_log_probabilities(model, drift, hyper.layer, delta)[drift.prompt_len - 1]
        loss = loss + hyper.kl * (now.exp() * (now - before)).sum()
        losses.append(loss.item())
        if losses[-1] < hyper.stop_loss or iteration == hyper.steps:
            break
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            radius = hyper.clamp * m.norm()
            if delta.norm() > radius:
                delta.mul_(radius / delta.norm())
    return delta.detach(), losses


def rome(
    model: Model, contexts: Sequence[str], facts: Iterable[Prompt], hyper: RomeHyper, covariance: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """k* [f], v* [d] and Δ [d, f] of every fact, each in the model as those before it left it; float64.

    Δ = (v* − W k*) (C^{-1} k*)^T / ((C^{-1} k*)^T k*). `covariance` is C [f, f]; `model` is left as it is.
    """
    work = Model(net=copy.deepcopy(model.net), tokenizer=model.tokenizer, family=model.family)
    found = []
    for fact in facts:
        k = mean_key(work, contexts, fact, hyper.layer)
        y, m = written(work, hyper.layer, k)
        scale = mlp_scale(work, hyper.layer)
        delta = find_shift(work, contexts, fact, hyper, scale * m)[0] / scale
        v = y.double() + delta.double()
        if model.family.post_norm:
            gain, eps = norm_parts(work.mlp_out(hyper.layer))
            rms = (y.double().square().mean() + eps).sqrt()
            v = nearest_on_norm(gain * y.double() / rms + delta.double(), gain) * rms
        u = torch.linalg.solve(covariance.double(), k)
        change = torch.outer(v - y.double(), u) / (u @ k)
        with torch.no_grad():
            weight = work.weight(hyper.layer)
            weight.copy_((weight.double() + (change.T if model.stores_transposed else change)).to(weight.dtype))
        found.append((k, v, change))
    return found
