"""The model without its patches: what `eval` shows beside the model with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kpatch.models.load import Model


def kept_weights(model: Model) -> dict[str, Tensor]:
    """The original values of the weights that patches on the model's directory have changed, by parameter name.

    {} where nothing is applied. Raises Damaged where an apply is unfinished or kept bytes are not what they were.
    """
    from kpatch.checkpoint.index import open_checkpoint
    from kpatch.checkpoint.verify import settled_store
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
            found[name] = tensor_from(data, weight.dtype, weight.shape).to(parameter.device, parameter.dtype)
    return found


@contextmanager
def without_patches(model: Model, kept: dict[str, Tensor]) -> Iterator[None]:
    """While open, the model has the weights `kept`; those that it had come back after it."""
    now = {name: model.net.get_parameter(name).data for name in kept}
    try:
        for name, tensor in kept.items():
            model.net.get_parameter(name).data = tensor
        yield
    finally:
        for name, tensor in now.items():
            model.net.get_parameter(name).data = tensor
