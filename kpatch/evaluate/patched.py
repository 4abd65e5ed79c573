"""A patch in memory: a `with` changes the weights, and the very same tensors are back after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Lock, RLock, get_ident
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kpatch.errors import BadInput, Refused
from kpatch.evaluate.merged import merged_anew
from kpatch.evaluate.wrapped import active_adapter, adapted, copy_in_use, holder, merged_adapter, network, parameter
from kpatch.models.fingerprint import tokenizer_hash
from kpatch.models.model import Model
from kpatch.models.offload import can_hold, held
from kpatch.patch.combine import counted_twice
from kpatch.patch.delta import Delta, Dense, LowRank, patched_weight
from kpatch.patch.fingerprint import NAMES, sha256_of
from kpatch.patch.format import Patch, read_patch
from kpatch.patch.manifest import BaseWeight, matrix_shape
from kpatch.patch.matching import match
from kpatch.patch.sources import PatchSource
from kpatch.patch.summands import Part, summands
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

AnyModel = TypeVar("AnyModel")
Deltas = Mapping[str, Delta]


@dataclass(eq=False)
class _Weight:
    """A weight that live patches change: its name in the checkpoint, the tensor that it had before them, and the layer
    that PEFT had put around it.
    """

    name: str
    parameter: nn.Parameter
    base: Tensor
    layer: nn.Module | None


@dataclass(eq=False)
class _Live:
    """One patch in effect, the patches it holds, and the thread that entered it.

    Bare deltas have an empty `id` and no `parts`, which say where the deltas of a patch are from.
    """

    id: str
    deltas: Mapping[_Weight, Delta]
    holds: frozenset[str] = frozenset()
    parts: Mapping[_Weight, Part] = field(default_factory=dict)
    thread: int = field(default_factory=get_ident)


class _State:
    """The live patches of one network, in the order they came, and the weights they change.

    Callers hold `lock` around every method, since several threads may enter and leave patches.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.weights: list[_Weight] = []
        self.live: list[_Live] = []

    def weight(self, net: nn.Module, name: str, parameter: nn.Parameter) -> _Weight:
        """The record of a weight; a new one where no live patch changes it.

        Names are no key: one tensor can have two (tied), and PEFT renames what it wraps.
        """
        known = (one for one in self.weights if one.parameter is parameter)
        return next(known, None) or _Weight(name, parameter, parameter.data, adapted(net, name))

    def follow(self, net: nn.Module) -> None:
        """Take over what `net.to(…)` did meanwhile: other parameters, another dtype or device."""
        for weight in self.weights:
            now = parameter(net, weight.name)
            if now is not None and now.shape == weight.base.shape:
                weight.parameter = now
            if not weight.parameter.is_meta:  # moving the base there would lose it
                weight.base = weight.base.to(weight.parameter.device, weight.parameter.dtype)

    def enter(self, new: _Live) -> None:
        """Put a patch into effect. Raises Refused, before anything changes, for sums out of the dtype's range."""
        sums = {weight: self._summed(weight, [*self.live, new]) for weight in new.deltas}
        for weight, total in sums.items():
            if not bool(torch.isfinite(total).all()):
                raise Refused(
                    f"The patch drives {weight.name} out of the range of {_dtype(weight.base)}",
                    hint="load the model with `dtype` float32 or bfloat16",
                )
        self.live.append(new)
        self.weights += [weight for weight in sums if weight not in self.weights]
        for weight, total in sums.items():
            weight.parameter.data = total

    def leave(self, net: nn.Module, old: _Live, report: Reporter) -> None:
        """Take a patch out of effect. A failure at one weight does not keep the others from coming back."""
        if old in self.live:
            self.live.remove(old)
        self.follow(net)
        failed: list[BaseException] = []
        for weight in old.deltas:
            try:
                self._put(net, weight, report)
            except BaseException as error:
                failed.append(error)
        self.weights = [weight for weight in self.weights if any(weight in one.deltas for one in self.live)]
        if failed:
            raise failed[0]

    def _put(self, net: nn.Module, weight: _Weight, report: Reporter) -> None:
        if weight.parameter.is_meta:
            return  # offloaded meanwhile: there are no numbers to put back
        others = [one for one in self.live if weight in one.deltas]
        total = self._summed(weight, others) if others else weight.base
        with merged_anew(net, weight.name, weight.layer):
            weight.parameter.data = total
        if others and not bool(torch.isfinite(weight.parameter).all()):
            report.warn(f"{weight.name} is out of the range of {_dtype(weight.base)} with the patches that remain")

    @torch.no_grad()
    def _summed(self, weight: _Weight, live: Iterable[_Live]) -> Tensor:
        """What `apply` would make of one weight. The sum goes by patch id, so that the order does not matter."""
        by_id = sorted((one for one in live if weight in one.deltas), key=lambda one: one.id)
        bare = [one.deltas[weight] for one in by_id if weight not in one.parts]  # the empty id comes first
        return patched_weight(
            weight.base, [*bare, *summands([one.parts[weight] for one in by_id if weight in one.parts])]
        )


_states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()
_states_lock = Lock()


@contextmanager
def patched(
    model: AnyModel,
    patch: PatchSource | Deltas,
    tokenizer: Any = None,
    report: Reporter = SILENT,
) -> Iterator[AnyModel]:
    """Add a patch to a transformers model or a `Model` in memory while the `with` lasts; yields the model given.

    `model` may be inside a wrapper of PEFT, torch.compile or data parallelism. `patch` is the path of a patch, what
    was read from one, or {weight name: LowRank | Dense} in the orientation in which W is stored.

    W becomes round(base + Σ Δ), summed in float64 over all patches in effect; patches nest when made for the same
    base, and their order does not matter. Threads may enter and leave patches of one model in any order; the weights
    are the model's, so each thread sees the sum of all of them, and a warning says so. The original tensors come back
    with the last patch, after an error too; other changes made to these weights meanwhile are lost, but for
    `model.to(dtype)` and `model.to(device)`, which are followed, and for adapters that were on the model before and
    are merged, which ends as a merge without the patch.

    With a tokenizer (a Model has one), a warning says when the patch was made with another one. Raises Refused,
    before anything changes, for another base, names or shapes that do not fit, a patch that is in effect already
    (itself, in a stack or as an active adapter), a weight into which an adapter is merged or of which one runs a copy
    (`modules_to_save`), or that is not in memory; BadInput, Damaged for a file that is no patch; BadInput for
    something that is no model.
    """
    net = network(model)
    deltas = _read(patch)
    whole = deltas if isinstance(deltas, Patch) else None
    tokenizer = tokenizer or (model.tokenizer if isinstance(model, Model) else None)
    with _states_lock:
        state = _states.setdefault(net, _State())
    held_weights = ExitStack()
    with state.lock, ExitStack() as failed:
        failed.enter_context(held_weights)
        held_weights.enter_context(held(_offloaded(net, deltas)))
        state.follow(net)
        new = _fitting(net, state, deltas)
        _check_copies(net, new)
        _check_merged(net, new)
        if whole is not None:
            _check_once(state, new)
            _check_base(whole, {weight.name: weight.base for weight in new.deltas})
        _check_adapters(net, new, deltas.deltas if isinstance(deltas, Patch) else deltas)
        _warn(state, new, whole, tokenizer, report)
        try:
            state.enter(new)
        except BaseException:
            state.leave(net, new, report)
            raise
        failed.pop_all()
    try:
        yield model
    finally:
        with state.lock, held_weights:
            state.leave(net, new, report)


def _offloaded(net: nn.Module, patch: Patch | Deltas) -> list[nn.Module]:
    """Modules that load their weights when they run, among those that a patch changes: they stay in memory with it."""
    names = (patch.deltas if isinstance(patch, Patch) else patch).keys()
    found = (holder(net, name) for name in names)
    return [module for module in found if module is not None and can_hold(module)]


def check_fit(model: Model, patch: Patch) -> None:
    """Check that `model` has the very weights that `patch` was made for; nothing is changed. Raises Refused."""
    net = network(model)
    with held(_offloaded(net, patch)):
        found = _fitting(net, _State(), patch)
        _check_base(patch, {weight.name: weight.base for weight in found.deltas})


def _read(patch: PatchSource | Deltas) -> Patch | Deltas:
    if isinstance(patch, Patch):
        return patch
    if isinstance(patch, Mapping):
        given: Mapping[Any, Any] = patch
        wrong = next((name for name, delta in given.items() if not isinstance(delta, LowRank | Dense)), None)
        if wrong is not None:
            raise BadInput(
                f"The change of {printable(str(wrong), 120)} is a {type(given[wrong]).__name__}",
                details=["expected a LowRank or a Dense of kpatch.patch.delta"],
                hint="Dense(matrix) holds a tensor as it is",
            )
        return patch
    if isinstance(patch, Sequence) and not isinstance(patch, str):
        raise BadInput("Expected one patch, found several", hint="nest them: one `with` for each, or stack them")
    return read_patch(patch)


def _fitting(net: nn.Module, state: _State, patch: Patch | Deltas) -> _Live:
    """A patch on the weights that it is for. Raises Refused with everything that does not fit."""
    name_of = patch.id if isinstance(patch, Patch) else ""
    deltas = patch.deltas if isinstance(patch, Patch) else patch
    found: dict[_Weight, Delta] = {}
    parts: dict[_Weight, Part] = {}
    wrong: list[str] = []
    for name, delta in deltas.items():
        shown = printable(name, 120)
        weight = parameter(net, name)
        if weight is None:
            wrong.append(f"{shown}: the model has no such weight")
        elif weight.is_meta:
            wrong.append(f"{shown}: its values are not in memory (offloaded)")
        elif weight.dtype not in NAMES:
            wrong.append(f"{shown}: expected float numbers, found {_dtype(weight)}")
        elif not weight.ndim or matrix_shape(weight.shape) != delta.shape:
            wrong.append(f"{shown}: expected shape {list(delta.shape)}, found {list(weight.shape)}")
        elif any(one.parameter is weight for one in found):
            wrong.append(f"{shown}: the model has one tensor for it and for another weight of the patch")
        else:
            record = state.weight(net, name, weight)
            found[record] = delta
            if isinstance(patch, Patch):
                parts[record] = Part(patch, name)
    if wrong:
        raise Refused(
            f"{_called(name_of)} does not fit this model",
            details=wrong,
            hint="`kpatch show` names the base a patch was made for",
        )
    holds = patch.manifest.holds(name_of) if isinstance(patch, Patch) else frozenset[str]()
    return _Live(name_of, found, holds, parts)


def _check_once(state: _State, new: _Live) -> None:
    if counted_twice([*(one.holds for one in state.live), new.holds]) is not None:
        raise Refused(f"{_called(new.id)} is on this model already, itself or in a stack")


def _check_adapters(net: nn.Module, new: _Live, deltas: Deltas) -> None:
    adapter = active_adapter(net, deltas)
    if adapter is not None:
        raise Refused(
            f"{_called(new.id)} is on this model already, as its active adapter {adapter!r}",
            hint="its edit would count twice: disable the adapter, or leave the patch out",
        )


def _check_copies(net: nn.Module, new: _Live) -> None:
    copied = ((weight.name, copy_in_use(net, weight.name)) for weight in new.deltas)
    for name, adapter in copied:
        if adapter is not None:
            raise Refused(
                f"{_called(new.id)} would change nothing of what runs: adapter {printable(adapter, 80)!r} runs a copy"
                f" of its own of {printable(name, 120)} (modules_to_save)",
                hint="turn it off with PEFT's `with model.disable_adapter()`, or load the model without this adapter",
            )


def _check_merged(net: nn.Module, new: _Live) -> None:
    adapter = merged_adapter(net, (weight.name for weight in new.deltas))
    if adapter is not None:
        raise Refused(
            f"{_called(new.id)} does not fit this model: adapter {printable(adapter, 80)!r} is merged into it",
            hint="take it out with PEFT's `model.unmerge_adapter()`, or leave the patch out",
        )


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
    how = match(expected, tensor.shape, found, lambda: sha256_of(tensor), lambda: tensor)
    if how in ("same bytes", "other dtype"):
        return []
    if how == "other shape":
        return [f"{shown}: expected shape {list(expected.shape)}, found {list(tensor.shape)}"]
    if found == expected.dtype:
        return [f"{shown}: expected sha256 {expected.sha256[:12]}…, found {sha256_of(tensor)[:12]}…"]
    return [f"{shown}: other weights, not the same ones in {found} instead of {expected.dtype}"]


def _warn(state: _State, new: _Live, patch: Patch | None, tokenizer: Any, report: Reporter) -> None:
    """Warn of what makes a patch another change than the one that was measured, but not a wrong one."""
    others = [one for one in state.live if one.thread != new.thread]
    if others:
        report.warn(
            f"{_called(others[0].id)} is on this model too, entered by another thread: both threads see the sum"
        )
    if patch is None:
        return
    on = {identity for one in state.live for identity in (one.id, *one.holds)}
    missing = [parent[:12] for parent in patch.manifest.parents if parent not in on]
    if missing:
        report.warn(f"{_called(patch.id)} was made on top of {', '.join(missing)}, which this model does not carry")
    expected = patch.manifest.base.tokenizer
    if expected is not None and tokenizer is not None and tokenizer_hash(tokenizer) != expected:
        report.warn(f"{_called(patch.id)} was made with another tokenizer than this model's; its facts may not hold")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _called(patch_id: str) -> str:
    return f"Patch {patch_id[:12]}" if patch_id else "The change"
