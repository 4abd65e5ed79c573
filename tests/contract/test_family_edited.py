"""Every family through make, apply, ask and revert, against transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families import FACT, asked, digest, edit
from kpatch.models.families import FAMILIES
from tests.support.models import ONLY_WRAPPED, WRAPPERS

MODELS = sorted({*FAMILIES, *WRAPPERS} - set(ONLY_WRAPPED))
WRAPPED = {"gemma3", "qwen2_5_vl", "mistral3", "llama4"}
EXPERTS = {"deepseek_v3", "qwen2_moe", "qwen3_moe"}  # a shared expert; one behind a gate; none
# Plain; stored [in, out]; a norm behind the MLP; scaled; the residual inside the MLP; layers of several kinds
QUICK = {"llama", "gpt2", "gemma2", "granite", "minicpm3", "gemma4_text", "bloom", "falcon", "lfm2", "qwen3_5_text",
         *WRAPPED, *EXPERTS}  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODELS]
)
def test_an_edit_arrives_and_goes_again(family: str, tmp_path: Path) -> None:
    tried = edit(family, tmp_path)
    assert tried.layers == (1, 2)
    assert tried.after > 1.5 * tried.before, FACT
    assert tried.off < 1e-5
    assert tried.bytes_back
    assert asked(tmp_path / "model")[0] == pytest.approx(tried.before)
    assert digest(tmp_path / "model") == tried.base
