"""MEND and MALMEN's regression written the plain way: one fact, one token and one matrix at a time, whole networks.

Nothing here uses kpatch.mend but the numbers of the editor (`parameters`) and the names of the matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from kpatch.models.model import Model


@dataclass(frozen=True)
class Asked:
    """Token ids, and where which token should follow; without tokens only the places."""

    ids: tuple[int, ...]
    reads: tuple[int, ...]
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """A weight [out, in], or [in, out] if `turned`; `shape` and `mode` say which part of the editor is for it."""

    name: str
    turned: bool
    shape: str
    mode: int


def log_p(model: Model, weights: Mapping[str, Tensor], row: Asked) -> Tensor:
    """log P at the places that are read: [M, V]."""
    ids = torch.tensor([row.ids])
    out = functional_call(model.net, dict(weights), kwargs={"input_ids": ids, "use_cache": False})
    return out.logits[0, list(row.reads)].log_softmax(-1)


def nll(model: Model, weights: Mapping[str, Tensor], row: Asked) -> Tensor:
    """The mean over the target's tokens of −log P."""
    found = log_p(model, weights, row)
    total: Tensor = -sum(found[at, token] for at, token in enumerate(row.tokens)) / len(row.tokens)  # type: ignore[assignment]
    return total


def token_gradients(model: Model, matrices: Sequence[Matrix], row: Asked) -> list[list[tuple[Tensor, Tensor]]]:
    """For each matrix (u, δ) of every token whose u and δ are not zero."""
    inputs: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}
    handles = []
    for matrix in matrices:

        def hook(module: Any, given: Any, out: Tensor, name: str = matrix.name) -> Tensor:
            inputs[name] = given[0].detach().reshape(len(row.ids), -1)
            probes[name] = torch.zeros_like(out).requires_grad_()
            return out + probes[name]

        module = model.net.get_submodule(matrix.name.removesuffix(".weight"))
        handles.append(module.register_forward_hook(hook))
    nll(model, {}, row).backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    result = []
    for matrix in matrices:
        gradient = probes[matrix.name].grad
        assert gradient is not None
        pairs = zip(inputs[matrix.name], gradient.reshape(len(row.ids), -1), strict=True)
        result.append([(u, delta) for u, delta in pairs if bool((u != 0).any() and (delta != 0).any())])
    return result


def pseudo(parameters: Mapping[str, Tensor], matrix: Matrix, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """g(z) of eq. 3 for one token: z = normalized (u, δ); h = z + σ(s¹ ⊙ (U₁V₁z + b) + o¹); g = h + σ(…)."""
    part = f"transforms.{matrix.shape}."
    z = (torch.cat([u, delta]) - parameters[part + "mean"]) / (parameters[part + "std"] + 1e-7)
    for block in (0, 1):
        p = {key: parameters[f"{part}blocks.{block}.{key}"] for key in ("u", "v", "bias", "scale", "offset")}
        inside = p["u"].mv(p["v"].mv(z)) + p["bias"]
        z = z + torch.relu(p["scale"][matrix.mode] * inside + p["offset"][matrix.mode])
    return z[: len(u)], z[len(u) :]


def updates(
    model: Model,
    parameters: Mapping[str, Tensor],
    matrices: Sequence[Matrix],
    facts: Sequence[Asked],
    regression: bool,
) -> dict[str, Tensor]:
    """The change of every matrix, as it is stored, that all facts together give; in float64 behind the gradients."""
    parameters = {name: tensor.double() for name, tensor in parameters.items()}
    found = [token_gradients(model, matrices, fact) for fact in facts]
    result = {}
    for number, matrix in enumerate(matrices):
        tokens = [(u.double(), delta.double()) for fact in found for u, delta in fact[number]]
        alpha = parameters["steps"][number]
        outs, inside = len(tokens[0][1]), len(tokens[0][0])
        if regression:  # S minimizes Σ ‖S u_j − v_j‖² + λ tr(S P⁻¹ Sᵀ), P = I unless the editor has another
            ridge = parameters["ridges"][number].exp() * parameters["sizes"][number]
            precision = parameters.get(f"precisions.{number}.matrix", torch.eye(inside, dtype=alpha.dtype))
            gram = ridge * torch.linalg.inv(precision)
            cross = torch.zeros(outs, inside, dtype=alpha.dtype)
            for u, delta in tokens:
                pseudo_u, pseudo_delta = pseudo(parameters, matrix, u, delta)
                v = -alpha * (u @ pseudo_u) * pseudo_delta
                gram, cross = gram + torch.outer(u, u), cross + torch.outer(v, u)
            change = cross @ torch.linalg.inv(gram)
        else:  # W − α Σ δ̃ ũᵀ
            change = torch.zeros(outs, inside, dtype=alpha.dtype)
            for u, delta in tokens:
                pseudo_u, pseudo_delta = pseudo(parameters, matrix, u, delta)
                change = change - alpha * torch.outer(pseudo_delta, pseudo_u)
        result[matrix.name] = change.T if matrix.turned else change
    return result


def edited(model: Model, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: model.net.get_parameter(name).detach() + change for name, change in changes.items()}


def drift(model: Model, weights: Mapping[str, Tensor], row: Asked) -> Tensor:
    """KL(p ‖ p̃), the mean over the places that are read."""
    before, after = log_p(model, {}, row).detach(), log_p(model, weights, row)
    return (before.exp() * (before - after)).sum(-1).mean()


def finite_differences(loss: Callable[[], Tensor], parameter: Tensor, places: Sequence[int], size: float) -> Tensor:
    """Central differences of `loss` along single coordinates of `parameter`, which is changed in place and back."""
    found = []
    flat = parameter.data.view(-1)
    for place in places:
        ends = []
        for sign in (1, -1):
            before = flat[place].item()
            flat[place] = before + sign * size
            ends.append(float(loss()))
            flat[place] = before
        found.append((ends[0] - ends[1]) / (2 * size))
    return torch.tensor(found, dtype=torch.float64)


def moment(model: Model, matrix: Matrix, rows: Sequence[Sequence[int]]) -> Tensor:
    """E[u uᵀ] over all tokens of some rows of ids, where u goes into a matrix."""
    found: list[Tensor] = []
    module = model.net.get_submodule(matrix.name.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    with torch.no_grad():
        for row in rows:
            model.net(input_ids=torch.tensor([row]), use_cache=False)
    handle.remove()
    u = torch.cat([one.flatten(0, -2) for one in found])
    return u.T @ u / len(u)
