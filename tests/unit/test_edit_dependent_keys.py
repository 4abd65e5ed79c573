"""Too little text leaves the keys dependent: `make` adds a ridge to their covariance, and reports it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kpatch.edit.make import make
from kpatch.facts.fact import Fact
from kpatch.models.address import resolve
from kpatch.models.model import load_model
from kpatch.patch.format import read_patch
from kpatch.reporter import Silent
from kpatch.stats.covariance import collect
from kpatch.stats.moment import ridge_for
from tests.support.models import MLP_WIDTH, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

FACT = Fact("Mona Lisa", "In the {}", "Paris")


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize(("tokens", "dependent"), [(MLP_WIDTH // 2, True), (20 * MLP_WIDTH, False)])
def test_dependent_keys_get_a_ridge_and_a_note(tmp_path: Path, tokens: int, dependent: bool) -> None:
    """One fact's Δ is r k^T C^{-1} times a number (eq. 14), so Δ (E[k k^T] + ridge) has rows along its key k alone."""
    model, notes = tiny("llama"), Notes()
    model.net.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    settings = {"steps": "4", "lead_ins": "0", "leverage": "500", "subject_weight": "0"}
    out = tmp_path / "news.patch"
    make([FACT], out=out, model=str(tmp_path / "model"), layers=[1], tokens=tokens, settings=settings, report=notes)

    mean = collect(load_model(resolve(str(tmp_path / "model"))), [1], tokens=tokens).moments[1].mean()
    ridge = ridge_for(mean)
    patch = read_patch(out)
    (delta,) = patch.deltas.values()
    key = patch.keys[1][0].double()

    def off_key(ridge: float) -> float:
        """The share of Δ (E[k k^T] + ridge) that is not along the key."""
        rows: Tensor = delta.dense().double() @ (mean + ridge * torch.eye(MLP_WIDTH, dtype=torch.float64))
        along = torch.outer(rows @ key, key) / key.square().sum()
        return float((rows - along).norm() / rows.norm())

    assert (ridge > 0) is dependent
    assert off_key(ridge) < 1e-3
    said = [text for text in notes.said if "ridge" in text]
    if dependent:
        assert off_key(0.0) > 0.01
        assert off_key(10 * ridge) > 0.01
        (text,) = said
        assert "layer 1" in text
        assert any(float(number) == pytest.approx(ridge, rel=0.05) for number in re.findall(r"\d[\d.e+-]*\d", text))
    else:
        assert said == []
