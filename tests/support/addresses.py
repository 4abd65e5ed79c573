"""Addresses that must not resolve."""

from __future__ import annotations

from pathlib import Path

import pytest

from kpatch.errors import BadInput, KpatchError
from kpatch.models.address import resolve


def refused(what: str | Path) -> KpatchError:
    """The error that an address gives, which must say what to do."""
    with pytest.raises(BadInput) as caught:
        resolve(str(what))
    assert caught.value.hint, "a user needs to know what to do"
    return caught.value
