"""The patch that ships, its questions, and the model it was made for."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest

from kpatch.facts.load import load_facts
from kpatch.models.aliases import SMOLLM2

PATCH = Path(__file__).parents[2] / "patches" / "news.patch"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(SMOLLM2.module) is None, reason=f"needs the package {SMOLLM2.package}"
)


def gguf_file() -> Path:
    """The Q4_1 GGUF file inside the installed package."""
    spec = importlib.util.find_spec(SMOLLM2.module)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / SMOLLM2.file


def prompts() -> list[str]:
    return [fact.text() for fact in load_facts(PATCH.with_suffix(".yaml")).facts]


def known(answers: Sequence[str]) -> int:
    """How many of the answers, in the order of `prompts`, begin with the patch's target."""
    targets = [fact.target for fact in load_facts(PATCH.with_suffix(".yaml")).facts]
    return sum(answer.strip().startswith(target) for answer, target in zip(answers, targets, strict=True))
