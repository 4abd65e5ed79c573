"""MLPs over the tokens that count: padding, and outputs nobody reads, are left out of three quarters of the work.

An MLP treats each token by itself, so running it on chosen tokens and putting the results back is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from kpatch.models.load import Model


@contextmanager
def packed_mlps(model: Model, first: int, last: int, real: Tensor, read: Tensor) -> Iterator[None]:
    """While open, MLPs of layers first..last-1 see only tokens `real`, and the last one only tokens `read`.

    real, read: flat indices into [B * T]. Every other token's MLP output is 0. A family whose layer has no
    module around its MLP (OPT) runs as it is.
    """
    name = model.family.down.rpartition(".")[0]
    if not name:
        yield
        return
    mlps = [model.layer(index).get_submodule(name) for index in range(first, last)]
    originals = [mlp.__dict__.get("forward") for mlp in mlps]
    try:
        for position, mlp in enumerate(mlps):
            mlp.forward = _on(mlp, read if position == len(mlps) - 1 else real)
        yield
    finally:
        for mlp, original in zip(mlps, originals, strict=True):
            if original is None:
                mlp.__dict__.pop("forward", None)
            else:
                mlp.forward = original


def _on(mlp: nn.Module, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    inner = mlp.forward

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])  # (B * T, d)
        out = inner(flat[tokens])
        whole: Tensor = out.new_zeros(flat.shape[0], out.shape[-1]).index_copy(0, tokens, out)
        return whole.view(hidden.shape)

    return forward
