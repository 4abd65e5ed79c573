"""The attention for a few columns gives what each family's own attention gives, and is gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kpatch.models import fast_forward
from kpatch.models.families import FAMILIES
from kpatch.models.fast_forward import few_columns, few_columns_attention
from kpatch.models.partial_forward import align, record_suffix
from tests.support.families import REPRESENTATIVE, slow_beyond
from tests.support.models import tiny

ROWS, COLUMNS = [[5, 9, 11, 3, 8, 7, 2], [4, 6, 8, 1], [10, 11, 12, 13, 14, 15, 16, 17, 18]], [4, 1, 5]
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"] * 2}
CASES = (*FAMILIES, "qwen2-sliding")


@pytest.mark.parametrize("case", slow_beyond((*REPRESENTATIVE, "qwen2-sliding"), CASES))
def test_suffix_runs_and_gradients_are_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(case) if case in FAMILIES else tiny("qwen2", **SLIDING)
    before = model.net.config._attn_implementation
    calls_seen = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls_seen.append(args[1].shape)
        return few_columns(*args, **kwargs)

    monkeypatch.setattr(fast_forward, "few_columns", counted)

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        batch = align(ROWS, COLUMNS, model.pad_id)
        calls, hidden = record_suffix(model, batch, 0)
        hidden = hidden.requires_grad_()
        out = calls.run(hidden, 1, model.n_layers)[batch.mask[:, batch.column :].bool()]
        return out.detach(), torch.autograd.grad(out.square().sum(), hidden)[0]

    expected = outcome()
    assert not calls_seen
    with few_columns_attention(model):
        found = outcome()
    assert bool(calls_seen) == model.net.is_backend_compatible()
    assert model.net.config._attn_implementation == before
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_the_network_gets_its_own_attention_back_after_an_error() -> None:
    model = tiny("llama")
    before = model.net.config._attn_implementation

    def fail() -> None:
        with few_columns_attention(model):
            assert model.net.config._attn_implementation != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.net.config._attn_implementation == before
