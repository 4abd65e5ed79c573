"""Is a weight the one a patch was made for? Torch is imported only to compare the same weights in another dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from kpatch.patch.fields import FLOAT_DTYPES
from kpatch.patch.manifest import BaseWeight

if TYPE_CHECKING:
    from torch import Tensor

Match = Literal["same bytes", "other dtype", "other shape", "other weights"]


def match(
    expected: BaseWeight, shape: Sequence[int], dtype: str, sha256: Callable[[], str], tensor: Callable[[], Tensor]
) -> Match:
    """What a weight is to the one a patch was made for; "other dtype" is the same weights, and fits as well.

    `dtype` is safetensors' name of how it is stored. The hash is asked for only where the shape is right, and the
    tensor only where the dtype is another one that holds float numbers.
    """
    if tuple(shape) != expected.shape:
        return "other shape"
    if sha256() == expected.sha256 and dtype == expected.dtype:
        return "same bytes"
    if dtype in FLOAT_DTYPES and dtype != expected.dtype:
        from kpatch.patch.fingerprint import same_weights

        if same_weights(expected.sketch, tensor(), expected.dtype):
            return "other dtype"
    return "other weights"
