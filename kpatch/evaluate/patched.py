"""A patch tried in memory: weights changed inside a `with`, the very same tensors back after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kpatch.errors import Refused
from kpatch.models.model import Model, tokenizer_hash
from kpatch.patch.delta import Delta, Dense, LowRank
from kpatch.patch.fingerprint import NAMES, same_weights, sha256_of
from kpatch.patch.format import Patch, read_patch
from kpatch.patch.manifest import BaseWeight, matrix_shape
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

_BLOCK = 1 << 22  # numbers of a weight summed in float64 at a time: 32 MiB

AnyModel = TypeVar("AnyModel")
Deltas = Mapping[str, Delta]


@dataclass(eq=False)
class _Applied:
    """One patch that is on now, and the patches it holds. `id` is empty for bare deltas."""

    id: str
    deltas: Deltas
    holds: frozenset[str] = frozenset()


@dataclass
class _State:
    """What is changed in one network: the tensors it had before, and the patches, in the order they came."""

    bases: dict[str, Tensor] = field(default_factory=dict)
    applied: list[_Applied] = field(default_factory=list)


_states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


@contextmanager
def patched(
    model: AnyModel,
    patch: Patch | Deltas | str | Path,
    tokenizer: Any = None,
    report: Reporter = SILENT,
) -> Iterator[AnyModel]:
    """Add a patch to a transformers model or a `Model` in memory while the `with` lasts; yields the model given.

    `patch` is a Patch, the path of one, or {weight name: LowRank | Dense} in the orientation in which W is stored.
    W becomes round(base + Σ Δ), summed in float64 over all patches that are on; patches nest when made for the same
    base, and their order does not matter. The original tensors themselves come back at the end, after an error too;
    changes made to the weights meanwhile are lost. With a tokenizer (a Model has one) another one than the patch was
    made with is warned of. Raises Refused, before anything changes, for another base, names or shapes that do not
    fit, a patch that is on already, a weight that is not in memory; BadInput, Damaged for a file that is no patch.
    """
    net: Any = model.net if isinstance(model, Model) else model
    if isinstance(patch, str | Path):
        patch = read_patch(patch)
    state = _states.setdefault(net, _State())
    if isinstance(patch, Patch):
        new = _Applied(patch.id, patch.deltas, patch.manifest.holds(patch.id))
    else:
        new = _Applied("", patch)
    weights = _fitting(net, new)
    if isinstance(patch, Patch):
        _check_once(state, new)
        _check_base(patch, {name: state.bases.get(name, weight.data) for name, weight in weights.items()})
        _check_company(state, patch, tokenizer or (model.tokenizer if isinstance(model, Model) else None), report)
    sums = {name: _summed(state, name, weight, new) for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            state.bases.setdefault(name, weight.data)
            weight.data = sums[name]
        state.applied.append(new)
        del sums
        yield model
    finally:
        if new in state.applied:
            state.applied.remove(new)
        for name, weight in weights.items():
            if name in state.bases:
                _put_back(state, name, weight)


def _put_back(state: _State, name: str, weight: nn.Parameter) -> None:
    if any(name in other.deltas for other in state.applied):
        weight.data = _summed(state, name, weight)
        return
    base = state.bases.pop(name)
    weight.data = base if base.device == weight.device else base.to(weight.device)


@torch.no_grad()
def _summed(state: _State, name: str, weight: nn.Parameter, new: _Applied | None = None) -> Tensor:
    """round(base + Σ Δ) for one weight. The sum goes by patch id, so that it is the same whatever came first."""
    base = state.bases.get(name, weight.data)
    applied = sorted([*state.applied, *([new] if new else [])], key=lambda one: one.id)
    wide = torch.device("cpu") if base.device.type == "mps" else base.device  # no float64 there
    deltas = [_on(one.deltas[name], wide) for one in applied if name in one.deltas]
    result = torch.empty_like(base, memory_format=torch.contiguous_format)
    rows, cols = matrix_shape(base.shape)
    before, after = base.reshape(rows, cols), result.view(rows, cols)
    step = max(1, _BLOCK // cols)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        total = before[begin:end].to(wide).double()
        for delta in deltas:
            total += delta.rows(begin, end)
        after[begin:end] = total.to(base.dtype)
    if not bool(torch.isfinite(result).all()):
        raise Refused(
            f"The patch drives {name} out of the range of {str(base.dtype).removeprefix('torch.')}",
            hint="load the model with --dtype float32 or bfloat16",
        )
    return result


def _on(delta: Delta, device: torch.device) -> Delta:
    if isinstance(delta, LowRank):
        return LowRank(delta.left.to(device), delta.right.to(device))
    return Dense(delta.delta.to(device), delta.known_rank)


def _fitting(net: Any, new: _Applied) -> dict[str, nn.Parameter]:
    """The parameters that the deltas are for. Raises Refused with everything that does not fit."""
    found, wrong = {}, []
    for name, delta in new.deltas.items():
        shown = printable(name, 120)
        try:
            weight = net.get_parameter(name)
        except AttributeError:
            wrong.append(f"{shown}: the model has no such weight")
            continue
        if weight.is_meta:
            wrong.append(f"{shown}: its values are not in memory (offloaded)")
        elif weight.dtype not in NAMES:
            wrong.append(f"{shown}: expected float numbers, found {str(weight.dtype).removeprefix('torch.')}")
        elif not weight.ndim or matrix_shape(weight.shape) != delta.shape:
            wrong.append(f"{shown}: expected shape {list(delta.shape)}, found {list(weight.shape)}")
        else:
            found[name] = weight
    if wrong:
        raise Refused(
            f"{_called(new.id)} does not fit this model",
            details=wrong,
            hint="`kpatch show` names the base a patch was made for",
        )
    return found


def _check_once(state: _State, new: _Applied) -> None:
    if any(one.id == new.id or one.holds & new.holds for one in state.applied):
        raise Refused(f"{_called(new.id)} is on this model already, itself or in a stack")


def _check_base(patch: Patch, bases: Mapping[str, Tensor]) -> None:
    expected = patch.manifest.base.weights
    wrong = [line for name, tensor in bases.items() for line in _misfit(name, expected.get(name), tensor)]
    if wrong:
        raise Refused(
            f"{_called(patch.id)} does not fit this model: its weights are not the base it was made for,"
            f" {patch.manifest.base.name}",
            details=wrong,
            hint="load that base without other patches; `kpatch show` names its hashes",
        )


def _misfit(name: str, expected: BaseWeight | None, tensor: Tensor) -> list[str]:
    shown = printable(name, 120)
    if expected is None:
        return [f"{shown}: the patch does not say which weight it was made for"]
    found = NAMES[tensor.dtype]
    if found == expected.dtype:
        sha256 = sha256_of(tensor)
        same = sha256 == expected.sha256
        return [] if same else [f"{shown}: expected sha256 {expected.sha256[:12]}…, found {sha256[:12]}…"]
    if same_weights(expected.sketch, tensor, expected.dtype):
        return []
    return [f"{shown}: other weights, not the same ones in {found} instead of {expected.dtype}"]


def _check_company(state: _State, patch: Patch, tokenizer: Any, report: Reporter) -> None:
    """Warn of what makes a patch less than it was measured to be, but not wrong."""
    on = {identity for one in state.applied for identity in (one.id, *one.holds)}
    missing = [parent[:12] for parent in patch.manifest.parents if parent not in on]
    if missing:
        report.warn(f"{_called(patch.id)} was made on top of {', '.join(missing)}, which this model does not carry")
    expected = patch.manifest.base.tokenizer
    if expected is not None and tokenizer is not None and tokenizer_hash(tokenizer) != expected:
        report.warn(f"{_called(patch.id)} was made with another tokenizer than this model's; its facts may not hold")


def _called(patch_id: str) -> str:
    return f"Patch {patch_id[:12]}" if patch_id else "The change"
