"""Every family through make, apply, ask and revert, against transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families import FACT, SETTINGS, asked, digest, edit
from kpatch.models.families import FAMILIES
from tests.support.families import slow_beyond
from tests.support.models import ONLY_WRAPPED, WRAPPERS

MODELS = sorted({*FAMILIES, *WRAPPERS} - set(ONLY_WRAPPED))

# A norm behind the MLP, in a model with vision; dense layers and shared experts in turn; a shared expert behind a
# gate. Plain layers and W stored [in, out] are in test_methods.py
QUICK = ("gemma3", "llama4", "qwen2_moe")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", slow_beyond(QUICK, MODELS))
def test_an_edit_arrives_and_goes_again(family: str, tmp_path: Path) -> None:
    tried = edit(family, tmp_path, {**SETTINGS, "refine": "4", "refine_from": "1"})
    assert tried.layers == (1, 2)
    assert tried.after > 1.5 * tried.before, FACT
    assert tried.off < 1e-5
    assert tried.bytes_back
    assert asked(tmp_path / "model")[0] == pytest.approx(tried.before)
    assert digest(tmp_path / "model") == tried.base
