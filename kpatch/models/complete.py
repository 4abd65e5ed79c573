"""Whether every weight of a loaded network came out of its checkpoint, whole and finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kpatch.errors import BadInput

_SHOWN = 5  # names in one message


def require_complete(net: Any, loaded: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse a network with weights that transformers made up, could not fit, or that are not numbers.

    `loaded` is what from_pretrained answers with output_loading_info. A tied weight is stored under its other name
    and is no hole. Raises BadInput with the number and the first names.
    """
    wrong = sorted(loaded.get("mismatched_keys") or [])
    if wrong:
        raise BadInput(
            f"{len(wrong)} weights of {name} do not have the shape that config.json says",
            where=where,
            details=[
                f"{key}: expected {list(expected)}, found {list(found)}" for key, found, expected in wrong[:_SHOWN]
            ],
            hint="give the config.json that belongs to these weights",
        )
    absent = set(loaded.get("missing_keys") or [])
    names = _names(net)
    missing = sorted(key for key in absent if names.get(key, {key}) <= absent)
    if missing:
        unknown = sorted(loaded.get("unexpected_keys") or [])
        details = [f"missing {key}" for key in missing[:_SHOWN]]
        if len(missing) > _SHOWN:
            details.append(f"… and {len(missing) - _SHOWN} more")
        if unknown:
            details.append(f"found {unknown[0]}, which the model has no place for ({len(unknown)} such)")
        raise BadInput(
            f"{len(missing)} weights of {name} are not in its checkpoint",
            where=where,
            details=details,
            hint="copy or download the checkpoint again, with the config.json that belongs to it",
        )
    broken = [key for key, weight in net.named_parameters() if not _finite(weight)]
    if broken:
        raise BadInput(
            f"{len(broken)} weights of {name} hold NaN or infinity",
            where=where,
            details=broken[:_SHOWN],
            hint="copy or download the checkpoint again",
        )


def _names(net: Any) -> dict[str, set[str]]:
    """All names of each weight that has several: one of them is stored, and stands for the others."""
    found: dict[int, set[str]] = {}
    for name, weight in net.named_parameters(remove_duplicate=False):
        found.setdefault(id(weight), set()).add(name)
    return {name: several for several in found.values() if len(several) > 1 for name in several}


def _finite(weight: torch.Tensor) -> bool:
    # A sum of finite numbers can overflow, but a sum that is finite has no NaN and no infinity among them
    return bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))) or bool(torch.isfinite(weight).all())
