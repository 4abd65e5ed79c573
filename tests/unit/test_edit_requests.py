"""Contexts: the bare prompt first, lead-ins of our own, then texts from the model, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kpatch.edit.requests import LEAD_INS, contexts_for, group_facts
from kpatch.errors import BadInput
from kpatch.facts.derived import unrelated_questions
from kpatch.facts.fact import Fact
from tests.support.models import tiny
from tests.support.templates import chatty


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


def test_questions_are_rows_in_chat_form_without_the_end_of_the_turn() -> None:
    model = chatty()
    asked = Fact("Mona Lisa", "The painting {} is in", "Rome", question="Where is {}?")
    silent = Fact("Moonlight", "The sonata {} is by", "Bach")
    first, second = group_facts(model, [asked, silent], ("", "One."), chat=1)
    row = first.rows[-1]
    text = model.tokenizer.decode(row.ids)
    assert text.endswith("<|im_start|>user\nWhere is Mona Lisa?<|im_end|>\n<|im_start|>assistant\nRome")
    assert model.tokenizer.decode(row.ids[row.prompt_len :]) == "Rome"
    assert model.tokenizer.decode(row.ids[: row.subject_last + 1]).endswith("Mona Lisa")
    assert (len(first.rows), first.bare, len(second.rows)) == (3, 0, 2)
    assert len(group_facts(model, [asked, silent], ("", "One."))[0].rows) == 2


def test_a_subject_that_opens_its_prompt_stands_elsewhere_in_its_question() -> None:
    fact = Fact("The", "{} is in", "Rome", question="Where is {}?")
    groups = group_facts(chatty(), [fact], ("",), chat=1)
    assert [(group.first, len(group.rows)) for group in groups] == [(True, 1), (False, 1)]


def test_a_question_s_statement_may_open_with_the_subject_and_other_wordings_may_not() -> None:
    stated, other = ("{} is in", "See {} in"), ("See {} in", "{} is in")
    for prompt, wordings, places in (
        ("Where is {}?", stated, [(True, 1), (False, 2)]),
        ("Where is {}?", other, [(False, 2)]),
        ("All of {} is in", stated, [(False, 2)]),
    ):
        groups = group_facts(tiny("llama"), [Fact("The", prompt, "Rome", wordings=wordings)], ("",))
        assert [(group.first, len(group.rows)) for group in groups] == places


def test_questions_alone() -> None:
    model = chatty()
    asked = Fact("Mona Lisa", "The painting {} is in", "Rome", wordings=("See {} in",), question="Where is {}?")
    (group,) = group_facts(model, [asked, replace(asked, question="Which city has {}?")], ("", "One."), chat=2)
    assert [model.tokenizer.decode(row.ids[row.prompt_len :]) for row in group.rows] == ["Rome", "Rome"]
    assert all("<|im_start|>user" in model.tokenizer.decode(row.ids) for row in group.rows)
    assert (group.bare, group.facts) == (0, (0, 1))
    with pytest.raises(BadInput, match="1 of 2 facts have no question"):
        group_facts(model, [asked, replace(asked, question=None)], ("",), chat=2)
    with pytest.raises(BadInput, match="chat=3 is not known"):
        group_facts(model, [asked], ("",), chat=3)


def test_questions_about_other_things_are_held() -> None:
    fact = Fact("Mona Lisa", "The painting {} is in", "Rome")
    (group,) = group_facts(tiny("llama"), [fact], ("", "One."), others=2)
    held = [tiny("llama").tokenizer.decode(row.ids) for row in group.drifts]
    questions = [text.replace("{}", "Mona Lisa") for text in unrelated_questions([fact], 2)]
    assert held == ["Mona Lisa is a", *questions]
    assert all(row.prompt_len == len(row.ids) for row in group.drifts), "nothing is learned there"
    assert group.tokens == sum(len(row.ids) - row.subject_last for row in (*group.rows, *group.drifts))
    assert len(group_facts(tiny("llama"), [fact], ("", "One."))[0].drifts) == 1


def test_a_subject_that_opens_its_text_has_no_question_that_does() -> None:
    (opening,) = group_facts(tiny("llama"), [Fact("The", "{} is in", "Rome")], ("",), others=2)
    assert opening.first
    assert len(opening.drifts) == 1
