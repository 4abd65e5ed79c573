"""A model without and with patches: what `eval` and `probe` show side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kpatch.reporter import Reporter

if TYPE_CHECKING:
    from torch import Tensor

    from kpatch.models.model import Model


Answer = TypeVar("Answer")


def without_and_with(
    say: Reporter, model: Model, patches: Sequence[Path], ask: Callable[[], Answer]
) -> tuple[Answer | None, Answer, list[str]]:
    """What `ask` answers about a model without its patches (None where it has none) and with them, and their names.

    The patches are `patches`, tried in memory. Without any, they are those that the model's directory carries.
    """
    from kpatch.evaluate.patched import patched

    if patches:
        with say.task("Measuring without patches"):
            before = ask()
        with ExitStack() as stack, say.task("Measuring with patches"):
            for path in patches:
                stack.enter_context(patched(model, path, report=say))
            return before, ask(), [path.stem for path in patches]
    kept = kept_weights(model)
    with say.task("Measuring"):
        after = ask()
    if not kept:
        return None, after, []
    from kpatch.checkpoint.store import Store

    assert model.path is not None
    on = [one.name for one in Store(model.path).applied().patches]
    say.note(f"{model.name} carries {', '.join(on)}")
    with without_patches(model, kept), say.task("Measuring without patches"):
        return ask(), after, on


def kept_weights(model: Model) -> dict[str, Tensor]:
    """The original values of the weights that patches on the model's directory have changed, by parameter name.

    {} where nothing is applied. Raises Damaged where an apply is unfinished or kept bytes are not what they were.
    """
    from kpatch.checkpoint.fit import settled_store
    from kpatch.checkpoint.shards import open_checkpoint
    from kpatch.errors import Damaged
    from kpatch.patch.fingerprint import sha256_of, tensor_from

    if model.path is None or not (model.path / ".kpatch").is_dir():
        return {}
    checkpoint = open_checkpoint(model.path)
    store = settled_store(checkpoint)
    applied = store.applied().weights
    found = {}
    for name, parameter in model.net.named_parameters():
        stored = checkpoint.find(name)
        if stored is not None and stored in applied:
            weight = applied[stored]
            data = bytearray(store.base(weight.base).read_bytes())
            if sha256_of(data) != weight.base:
                raise Damaged("Kept bytes are not what they were", where=str(store.base(weight.base)))
            found[name] = tensor_from(data, weight.dtype, weight.shape).to(
                "cpu" if parameter.is_meta else parameter.device, parameter.dtype
            )
    return found


@contextmanager
def without_patches(model: Model, kept: dict[str, Tensor]) -> Iterator[None]:
    """Inside the `with`, the model has the weights `kept`; those that it had come back after it."""
    from kpatch.models.offload import in_memory

    with in_memory(model.net, kept):
        now = {name: model.net.get_parameter(name).data for name in kept}
        try:
            for name, tensor in kept.items():
                parameter = model.net.get_parameter(name)
                parameter.data = tensor.to(parameter.device)
            yield
        finally:
            for name, tensor in now.items():
                model.net.get_parameter(name).data = tensor
