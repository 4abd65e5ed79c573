"""Contexts: the bare prompt first, lead-ins of our own, then texts from the model, the same for the same seed."""

from __future__ import annotations

import pytest

from kpatch.edit.requests import LEAD_INS, contexts_for, group_facts
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from tests.support.models import tiny


def test_bare_then_lead_ins_then_sampled() -> None:
    model = tiny("llama")
    found = contexts_for(model, 2, 3, 4, seed=1)
    assert found[:3] == ("", *LEAD_INS[:2])
    assert len(found) == 6
    assert all(text.endswith(".") and "{" not in text for text in found[3:])
    assert contexts_for(model, 0, 3, 4, seed=1) == ("", *found[3:])
    assert contexts_for(model, 0, 3, 4, seed=2) != ("", *found[3:])
    assert contexts_for(model, 0, 0, 4, seed=1) == ("",)


def test_more_lead_ins_than_there_are() -> None:
    with pytest.raises(BadInput, match="too large"):
        contexts_for(tiny("llama"), len(LEAD_INS) + 1, 0, 4, seed=0)


@pytest.mark.parametrize(("wordings", "rows"), [(0, 5), (1, 5), (3, 5), (4, 6)])
def test_a_wording_takes_the_place_of_a_spare_context(wordings: int, rows: int) -> None:
    fact = Fact("Mona Lisa", "The painting {} is in", "Rome", wordings=("One can see {} in",) * wordings)
    (group,) = group_facts(tiny("llama"), [fact], ("", "One.", "Two.", "Three.", "Four."), spare=3)
    assert len(group.rows) == rows
    assert sum(0 < number < 5 for number in group.contexts) == max(1, 4 - wordings)
