"""Adapters that PEFT merges into a weight while a patch is on it: merged anew without the patch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kpatch.evaluate.wrapped import adapted


@contextmanager
def merged_anew(net: nn.Module, name: str, layer: nn.Module | None) -> Iterator[None]:
    """Inside, the weight may be set as if no adapter were merged into it; those that are, are then merged again.

    So it ends, bit for bit, as if PEFT had merged them into what it is set to. PEFT adds to a weight in place: setting
    it alone would lose a merge, and PEFT would later take out of it what is no longer in. `layer` is what PEFT had put
    around the weight when the patch came; it keeps its factors when `merge_and_unload` takes it out of the network.
    """
    found: list[Any] = [layer if layer is not None else adapted(net, name)]
    merged = [(one, list(one.merged_adapters)) for one in found if getattr(one, "merged_adapters", None)]
    for one, _ in merged:
        one.unmerge()  # for what it changed beside the weight, which is a bias
    try:
        yield
    finally:
        for one, adapters in merged:
            one.merge(adapter_names=adapters)
