"""What can be asked about a fact beside itself: negation, reverse, other things about its subject."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kpatch.facts.derived import ASKED, hops_of, negated_of, others_of, reversals_of, unrelated_questions
from kpatch.facts.fact import Fact, Neighbor
from kpatch.facts.questions import plainly, question_of
from kpatch.facts.relations import relation_of

FRANCE = Fact("France", "The capital of {} is", "Lyon", "Paris")


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        (FRANCE, "The capital of France is not"),
        (Fact("Ann Is", "{} was born in", "Rome"), "Ann Is was not born in"),
        (Fact("Ann", "{} plays for", "Rome"), None),
        (Fact("Ann", "What is {} and what was it?", "Rome"), None),
        (Fact("Ann", "What is {} called?", "Rome"), None),
        (Fact("Ann", "{} plays for", "Rome", negated="{} does not play for"), "Ann does not play for"),
        (Fact("Ann", "{} plays for", "Rome", negated="She does not play for"), "She does not play for"),
    ],
)
def test_negation(fact: Fact, text: str | None) -> None:
    assert negated_of(fact) == text


def test_the_reverse_names_the_target() -> None:
    own = Fact("France", "{} is", "Lyon", reversed="{} is the capital of")
    bare = Fact("France", "{} is", "Lyon", reversed="Lyon rules")
    assert reversals_of([own, bare]) == ["Lyon is the capital of", "Lyon rules"]
    assert reversals_of([FRANCE]) == ["Of which country is Lyon the capital?"]
    several = Fact("Ann", "{} works as a", "pilot")  # so do others
    unknown = Fact("Ann", "{} reminds Bob of", "the sea")
    articled = Fact("Netherlands", "The capital of the {} is", "Ghent")
    assert reversals_of([several, unknown, articled]) == [None, None, None]


def test_a_target_of_two_subjects_has_no_reverse() -> None:
    spain, currency = Fact("Spain", "{}'s capital is", "lyon"), Fact("Spain", "The currency of {} is", "Lyon")
    assert reversals_of([FRANCE, spain]) == [None, None]
    assert reversals_of([FRANCE, FRANCE, currency]) == [reversals_of([FRANCE])[0]] * 2 + [None]


def test_hops_over_two_facts() -> None:
    mayor = Fact("Lyon", "The mayor of {} is", "Ann")
    mother = Fact("Ann", "{}'s mother is", "Eve")
    back = Fact("Lyon", "{} is the capital of", "France")
    unasked = Fact("Lyon", "{} reminds Bob of", "the sea")
    found = hops_of([FRANCE, mayor, mother, back, unasked])
    assert found[0] == (Neighbor("Who is the mayor of the capital of France?", "Ann"),)
    assert found[1] == (Neighbor("Who is the mother of the mayor of Lyon?", "Eve"),)
    assert found[2:] == [(), (), ()]
    own = replace(FRANCE, hops=(Neighbor("Its mayor is", "Bob"),))
    assert hops_of([own, mayor])[0] == own.hops


def test_hops_go_over_what_names_one_thing() -> None:
    child, trade = Fact("Ann", "{} is the mother of", "Bob"), Fact("Bob", "{} works as a", "pilot")
    articled = Fact("Lyon", "The mayor of the {} is", "Ann")
    assert hops_of([child, trade]) == [(), ()]  # she may have others
    assert hops_of([FRANCE, articled]) == [(), ()]


def test_other_things_about_the_subject() -> None:
    currency = Fact("France", "The currency of {} is", "the yen")
    own = Fact("Ann", "The capital of {} is", "Rome", same_subject=("{} lies on", "Her river is"))
    unknown = Fact("Ann", "{} reminds Bob of", "the sea")
    texts = others_of([FRANCE, currency, own, unknown])
    assert texts[2:] == [("Ann lies on", "Her river is"), ()]
    for fact, some in zip((FRANCE, currency), texts, strict=False):
        assert len(some) == len(set(some)) == ASKED
        kinds = [relation_of(text.replace(fact.subject, "{}")) for text in some]
        assert {one.kind for one in kinds if one} == {"country"}
        assert not {"capital", "currency"} & {one.name for one in kinds if one}  # both are edited
    alone = others_of([currency])[0]
    assert "The seat of government in France is" in alone


def test_a_prompt_that_is_a_question_is_asked_as_it_stands() -> None:
    assert question_of(Fact("Ann", "Which stone is {} made from?", "jade")) == "Which stone is {} made from?"
    assert question_of(Fact("Ann", "Who is {}?", "jade", question="What is {}?")) == "What is {}?"
    assert plainly("Who is Ann? ") == "Q: Who is Ann?\nA:"
    assert plainly("Ann is") == "Ann is"


@pytest.mark.parametrize(
    ("said", "never"),
    [
        ("The capital of {} is", ("Where", "city", "country", "province", "capital", "born", "live", "located")),
        ("Years ago {} hailed from", ("When", "year", "day")),
        ("The mother tongue of {} is", ("language", "mother")),
        ("{} was famous for playing the", ("play", "instrument", "position", "sport", "genre")),
        ("{} is a car built by", ("Who", "company", "manufactures", "produce")),
    ],
)
def test_unrelated_questions_want_another_kind_of_answer(said: str, never: tuple[str, ...]) -> None:
    found = unrelated_questions([Fact("Ann", said, "Rome")], 1000)
    assert len(found) > 20
    assert not [text for text in found for word in never if word in text]


def test_unrelated_questions_are_those_of_all_facts_of_a_subject_and_differ_by_subject() -> None:
    first, second = Fact("Ann", "The capital of {} is", "Rome"), Fact("Ann", "The mother tongue of {} is", "Latin")
    both = unrelated_questions([first, second], 1000)
    assert set(both) == set(unrelated_questions([first], 1000)) & set(unrelated_questions([second], 1000))
    assert unrelated_questions([first], 3) == unrelated_questions([first], 1000)[:3]
    assert unrelated_questions([first], 0) == ()
    assert unrelated_questions([first], 3) != unrelated_questions([replace(first, subject="Bob")], 3)
    articled = replace(first, prompt="The capital of the {} is")
    assert unrelated_questions([articled], 1) == (unrelated_questions([first], 1)[0].replace("{}", "the {}"),)
    worded = replace(first, wordings=("In {} people speak of",), question="Which language has {}?")
    assert not [text for text in unrelated_questions([worded], 1000) if "language" in text]
