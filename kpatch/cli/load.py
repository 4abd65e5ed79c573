"""The model that a command names, in memory: resolved, said which, loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpatch.cli.output import Output

if TYPE_CHECKING:
    from kpatch.models.load import Model


def load(out: Output, address: str, device: str, dtype: str, modules: dict[str, str] | None) -> Model:
    """Load the model called `address`, and print what it came to; a wrong address is told before torch is imported."""
    from kpatch.models.address import resolve

    resolved = resolve(address, out)
    out.note(resolved.said)
    with out.task(f"Loading {resolved.name}"):
        from kpatch.models.load import load_model

        return load_model(resolved, device=device, dtype=dtype, modules=modules)
