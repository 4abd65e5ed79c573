"""MEMIT one fact at a time, straight from the equations: slow, without padding, batches or caches.

Every row goes through the network's own forward by itself; hooks alone read and change what flows.
Source: Meng et al. 2023 (MEMIT), sections 4.2 and 4.3 and algorithm 1; several facts about one subject
share a value (MEMIT-Merge, 2502.07322). Nothing here uses kpatch.edit or partial runs.

Dimension letters: n subjects, d width, f MLP width, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kpatch.facts.tokens import Encoded, encode
from kpatch.models.model import Model

if TYPE_CHECKING:
    from kpatch.edit.presets import MemitPaperHyper

Prompt = tuple[str, str, str]  # prompt with one {}, subject, target


# One row through the network


def forward(model: Model, ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of one row."""
    row = torch.tensor([list(ids)], device=model.device)
    return model.net(input_ids=row, use_cache=False).logits[0]  # type: ignore[no-any-return]


@contextmanager
def output_changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, what leaves `module` is what `change` makes of it."""

    def hook(_: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (change(out[0]), *out[1:])
        return change(out)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def state(model: Model, row: Encoded, layer: int) -> Tensor:
    """h^l [d]: what leaves layer l at the subject's last token."""
    found: list[Tensor] = []

    def look(out: Tensor) -> Tensor:
        found.append(out[0, row.subject_last].clone())
        return out

    with output_changed(model.layer(layer), look):
        forward(model, row.ids)
    return found[0]


@torch.no_grad()
def key(model: Model, row: Encoded, layer: int) -> Tensor:
    """k^l [f]: what enters W^l at the subject's last token."""
    found: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].reshape(len(row.ids), -1)[row.subject_last].clone())

    handle = model.down(layer).register_forward_pre_hook(look)
    try:
        forward(model, row.ids)
    finally:
        handle.remove()
    return found[0]


def rows_for(model: Model, contexts: Sequence[str], prompts: Iterable[Prompt]) -> list[Encoded]:
    """Every fact in every context x_j: the prompt alone, or "x_j prompt"."""
    return [
        encode(model.tokenizer, prompt, subject, target, prefix=f"{context} " if context else "")
        for prompt, subject, target in prompts
        for context in contexts
    ]


# Values: z = h^L + δ


def next_token_log_probabilities(model: Model, row: Encoded, layer: int, delta: Tensor) -> Tensor:
    """log P [T, V] after each token of the row, with h^L += δ at the subject's last token."""
    here = torch.zeros(len(row.ids), 1, device=model.device, dtype=delta.dtype)
    here[row.subject_last] = 1
    with output_changed(model.layer(layer), lambda out: out + (here * delta).to(out.dtype)):
        return forward(model, row.ids).log_softmax(-1)


def objective(
    model: Model,
    rows: Sequence[Encoded],
    drift: Encoded,
    drift_before: Tensor,
    h: Tensor,
    delta: Tensor,
    hyper: MemitPaperHyper,
    layer: int,
) -> Tensor:
    """Mean over rows of −log P[target], plus drift on "{subject} is a", plus weight decay; a scalar.

    Every row weighs the same, and within a row every target token. `drift_before` [V] are log-probabilities
    without δ; the drift is Σ P_now (log P_now − log P_before). The decay is ‖δ‖ / ‖h‖², the norm not squared.
    """
    nll = torch.zeros((), device=model.device, dtype=delta.dtype)
    for row in rows:
        log_p = next_token_log_probabilities(model, row, layer, delta)
        target = row.ids[row.prompt_len :]
        for offset, token in enumerate(target):
            nll = nll - log_p[row.prompt_len - 1 + offset, token] / len(target) / len(rows)
    now = next_token_log_probabilities(model, drift, layer, delta)[drift.prompt_len - 1]
    kl = (now.exp() * (now - drift_before)).sum()
    decay: Tensor = delta.norm() / h.norm() ** 2
    return nll + hyper.kl * kl + hyper.weight_decay * decay


def find_value(
    model: Model, contexts: Sequence[str], prompts: Sequence[Prompt], hyper: MemitPaperHyper, layer: int
) -> tuple[Tensor, Tensor, list[float]]:
    """The value of one subject: z [d], h^L [d] of its first fact's bare prompt, and the loss of each iteration.

    `prompts` are the facts about the subject, one or several; `contexts` includes the empty one where it is wanted.
    Adam from δ = 0; an iteration computes the loss, ends the search if it is below `stop_loss` or the iteration is
    the last of `steps`, and else takes a step and clamps δ to the ball ‖δ‖ ≤ clamp · ‖h^L‖.
    """
    rows = rows_for(model, contexts, prompts)
    h = state(model, rows_for(model, [""], prompts[:1])[0], layer)
    drift = encode(model.tokenizer, "{} is a", prompts[0][1])
    delta = torch.zeros_like(h).requires_grad_()
    with torch.no_grad():
        drift_before = next_token_log_probabilities(model, drift, layer, delta)[drift.prompt_len - 1]

    adam = torch.optim.Adam([delta], lr=hyper.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    losses: list[float] = []
    for iteration in range(1, hyper.steps + 1):
        adam.zero_grad()
        loss = objective(model, rows, drift, drift_before, h, delta, hyper, layer)
        losses.append(loss.item())
        if losses[-1] < hyper.stop_loss or iteration == hyper.steps:
            break
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            radius = hyper.clamp * h.norm()
            if delta.norm() > radius:
                delta.mul_(radius / delta.norm())
    return h + delta.detach(), h, losses


# Keys and the update


def keys(model: Model, contexts: Sequence[str], prompts: Sequence[Prompt], layer: int) -> Tensor:
    """The key of one subject [f]: the mean over its facts and their contexts of the input of W^l.

    As in the authors' code it is a mean of two means, the bare prompts' and the contexts', where there are both.
    """
    kinds = [[context for context in contexts if (context == "") == bare] for bare in (True, False)]
    means = [
        torch.stack([key(model, row, layer) for row in rows_for(model, kind, prompts)]).double().mean(0)
        for kind in kinds
        if kind
    ]
    return torch.stack(means).mean(0)


def solve(k: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """Δ = R K^T (C + K K^T)^{-1} (eq. 14): K [f, n], R [d, n], C [f, f] → Δ [d, f], float64."""
    k, r, c = k.double(), r.double(), c.double()
    transposed: Tensor = torch.linalg.solve((c + k @ k.T).T, (r @ k.T).T)
    return transposed.T


def nearest_on_norm(target: Tensor, gain: Tensor) -> Tensor:
    """u [d] with ‖u‖² = d for which γ ⊙ u, what an RMS norm with gain γ can put out, is nearest to `target`.

    With D = diag(γ) and g = D t, the stationary points are (D² + μ I) u = g with ‖u‖² = d, and the minimum is the one
    with the largest μ. w = (D² + μ I)^{-1} u turns that into the quadratic eigenvalue problem
    (D² + μ I)² w = g g^T w / d, so μ is the largest real eigenvalue of a matrix of twice the size.
    Source: Gander, Golub and von Matt 1989, "A constrained eigenvalue problem".
    """
    t, g = target.double(), gain.double()
    width = len(t)
    squares, one = torch.diag(g**2), torch.eye(width, dtype=torch.float64)
    outer = torch.outer(g * t, g * t) / width
    eigenvalues = torch.linalg.eigvals(torch.cat([torch.cat([-squares, one], 1), torch.cat([outer, -squares], 1)]))
    real = eigenvalues.real[eigenvalues.imag.abs() < 1e-9 * (1 + eigenvalues.abs())]
    u = g * t / (g**2 + real.max())
    return u * (width**0.5 / u.norm())


def norm_parts(norm: nn.Module) -> tuple[Tensor, float]:
    """γ [d] in float64 and ε of an RMS norm; that of Gemma 2 and 3 stores γ − 1."""
    weight: Tensor = norm.weight.detach().double()  # type: ignore[operator]
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return (1 + weight if type(norm).__name__ in ("Gemma2RMSNorm", "Gemma3RMSNorm") else weight), float(eps)  # type: ignore[arg-type]


@torch.no_grad()
def pulled_back(model: Model, layer: int, k: Tensor, r: Tensor) -> Tensor:
    """What W^l must write more at key k [f], so that after the norm the residual stream moves by r [d], or nearly.

    With y = W k and m = norm(y), the target is m + r; y keeps its scale, which the norm swallows:
    y' = rms(y) u with γ ⊙ u nearest to the target. Returns y' − y, float64.
    """
    norm = model.mlp_out(layer)
    gain, eps = norm_parts(norm)
    y: Tensor = model.down(layer)(k.to(model.dtype))
    m = norm(y).double()
    rms = (y.double().square().mean() + eps).sqrt()
    return nearest_on_norm(m + r.double(), gain) * rms - y.double()


def mlp_scale(model: Model, layer: int) -> float:
    """What a layer multiplies the MLP's output by before it joins the residual stream, as its configuration says."""
    config = model.net.config
    if config.model_type == "granite":
        return float(config.residual_multiplier)
    if config.model_type == "minicpm3":
        return float(config.scale_depth / config.num_hidden_layers**0.5)
    return float(getattr(model.layer(layer), "layer_scalar", 1.0))  # Gemma 4 scales the sum


def by_subject(facts: Iterable[Prompt]) -> list[list[Prompt]]:
    """Facts with one subject together, in the order of their first."""
    groups: dict[str, list[Prompt]] = {}
    for fact in facts:
        groups.setdefault(" ".join(fact[1].split()), []).append(fact)
    return list(groups.values())


def memit(
    model: Model,
    contexts: Sequence[str],
    facts: Iterable[Prompt],
    hyper: MemitPaperHyper,
    covariances: Mapping[int, Tensor],
    *,
    values: Sequence[Tensor] | None = None,
    earlier: Mapping[int, Tensor] | None = None,
    update: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Algorithm 1: weight name → Δ [out, in] float64 for every layer of R; `model` is left as it is.

    `covariances` are E[k k^T] [f, f] by layer. `values` [d] by subject, in the order of `by_subject`, take the
    place of `find_value`; `earlier` [f, p] by layer are the keys of patches the model already carries; `update` gives
    Δ of a layer, its K [f, n] and R [d, n] in another way than eq. 14.
    """
    work = Model(net=copy.deepcopy(model.net), tokenizer=model.tokenizer, family=model.family)
    groups = by_subject(facts)
    layers = sorted(hyper.layers)
    last = layers[-1]
    if values is None:
        values = [find_value(work, contexts, group, hyper, last)[0] for group in groups]
    bare = [rows_for(work, [""], group[:1])[0] for group in groups]

    deltas: dict[str, Tensor] = {}
    for layer in layers:
        columns, residuals = [], []
        for group, row, z in zip(groups, bare, values, strict=True):
            k = keys(work, contexts, group, layer)
            r = (z.double() - state(work, row, last).double()) / (last - layer + 1) / mlp_scale(work, layer)
            columns.append(k)
            residuals.append(pulled_back(work, layer, k, r) if model.family.post_norm else r)
        k, r = torch.stack(columns, dim=1), torch.stack(residuals, dim=1)
        if update is None:
            c = hyper.covariance_weight * covariances[layer].double()
            if earlier is not None and layer in earlier:
                c = c + earlier[layer].double() @ earlier[layer].double().T
            delta = solve(k, r, c)  # [d, f]
        else:
            delta = update(layer, k, r)
        with torch.no_grad():
            weight = work.weight(layer)
            weight.copy_((weight.double() + (delta.T if model.stores_transposed else delta)).to(weight.dtype))
        deltas[model.weight_name(layer)] = delta
    return deltas
