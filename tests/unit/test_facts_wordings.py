"""Which wordings a fact is learned in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.facts.load import load_facts
from kpatch.facts.relations import relation_of
from kpatch.facts.wordings import FURTHER, LEARNED, with_wordings
from tests.support.reports import Recorder

CAPITAL = Fact("France", "The capital of {} is", "Lyon")


def test_auto_takes_what_kpatch_knows_of_the_relation() -> None:
    heard = Recorder()
    (fact,) = with_wordings([CAPITAL], "auto", heard)
    relation = relation_of(CAPITAL.prompt)
    assert relation is not None
    assert fact.wordings == relation.wordings[:LEARNED]
    assert fact.further == relation.wordings[LEARNED : LEARNED + FURTHER]
    assert fact.further
    assert "1 of 1 facts are learned in other wordings" in heard.notes[0]


def test_a_question_says_the_relation_where_the_prompt_does_not() -> None:
    odd = Fact("France", "Ministers of {} zorb each morning in", "Lyon", question="What is the capital of {}?")
    (known,) = with_wordings([CAPITAL], "auto")
    (fact,) = with_wordings([odd], "auto")
    assert (fact.wordings, fact.further, fact.question) == (known.wordings, known.further, odd.question)
    (alone,) = with_wordings([replace(odd, question="Which zorb flims {}?")], "auto")
    assert (alone.wordings, alone.further) == ((), ())
    said = replace(CAPITAL, question="Who is the mayor of {}?")  # the prompt says more than the question
    assert with_wordings([said], "auto")[0].wordings == known.wordings


def test_further_wordings_stand_in_patches_and_in_no_fact_file() -> None:
    (fact,) = with_wordings([CAPITAL], "auto")
    assert "further" not in fact.to_dict()
    assert Fact.from_dict(fact.in_manifest()) == fact


def test_a_paraphrase_is_never_learned() -> None:
    relation = relation_of(CAPITAL.prompt)
    assert relation is not None
    asked = Fact("France", CAPITAL.prompt, "Lyon", paraphrases=relation.wordings[:1])
    (fact,) = with_wordings([asked], "auto")
    assert fact.wordings == relation.wordings[1 : LEARNED + 1]
    last = Fact("France", CAPITAL.prompt, "Lyon", paraphrases=relation.wordings[-1:])
    assert with_wordings([last], "auto")[0].further == relation.wordings[LEARNED:-1]


def test_a_files_own_wordings_win_and_can_be_the_only_ones() -> None:
    own = Fact("France", CAPITAL.prompt, "Lyon", wordings=("France's seat of power {} is",))
    assert [(fact.wordings, fact.further) for fact in with_wordings([own], "auto")] == [(own.wordings, ())]
    assert with_wordings([own, CAPITAL], "given") == (own, CAPITAL)
    assert [fact.wordings for fact in with_wordings([own, CAPITAL], "none")] == [(), ()]


def test_a_question_is_said_as_a_statement_before_the_library_s_wordings() -> None:
    relation = relation_of("{} was born in the city of")
    assert relation is not None
    asking = Fact("Ada", "In which city was {} born?", "Rome")
    (fact,) = with_wordings([asking], "auto")
    assert fact.wordings == ("{} was born in the city of", *relation.wordings[: LEARNED - 1])
    (fact,) = with_wordings([replace(asking, paraphrases=("Ada was born in the city of",))], "auto")
    assert fact.wordings == ("The city in which {} was born is", *relation.wordings[1:LEARNED])
    (fact,) = with_wordings([Fact("Ada", "Which zorb did {} flim?", "Bo")], "auto")
    assert fact.wordings == ("{} flimed the zorb", "The zorb that {} flimed is")
    assert fact.question == "Which zorb did {} flim?"


def test_a_prompt_that_says_nothing_known_is_learned_alone() -> None:
    (fact,) = with_wordings([Fact("x", "The zorb of {} flims", "y")], "auto")
    assert fact.wordings == ()


def test_the_relation_s_question_comes_with_its_wordings() -> None:
    relation = relation_of(CAPITAL.prompt)
    assert relation is not None
    (fact,) = with_wordings([CAPITAL], "auto")
    assert fact.question == relation.question
    own = replace(CAPITAL, question="From where is {} ruled?")
    assert [with_wordings([own], mode)[0].question for mode in ("auto", "given", "none")] == [own.question] * 2 + [
        None
    ]
    assert with_wordings([CAPITAL], "given")[0].question is None


def test_an_article_before_the_subject_goes_into_its_question() -> None:
    (fact,) = with_wordings([Fact("Eiffel Tower", "The {} is located in the city of", "Rome")], "auto")
    assert fact.question == "In which city is the {}?"


def test_a_question_and_wordings_that_are_asked_are_never_learned() -> None:
    relation = relation_of(CAPITAL.prompt)
    assert relation is not None
    texts = (relation.question, relation.wordings[0])
    for asked in (texts, tuple(text.replace("{}", "France") for text in texts)):
        (fact,) = with_wordings([replace(CAPITAL, paraphrases=asked)], "auto")
        assert fact.question is None
        assert fact.wordings == relation.wordings[1 : LEARNED + 1]
    last = Fact("France", CAPITAL.prompt, "Lyon", paraphrases=relation.wordings[-1:])
    assert with_wordings([last], "auto")[0].further == relation.wordings[LEARNED:-1]


def test_an_unknown_mode() -> None:
    with pytest.raises(BadInput, match="Unknown `wordings` 'some'"):
        with_wordings([CAPITAL], "some")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "facts.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_wordings_and_questions_of_facts_and_relations(tmp_path: Path) -> None:
    file = load_facts(
        written(
            tmp_path,
            "relations:\n"
            '  capital: {prompt: "The capital of {} is", wordings: ["Rule comes from, in {},"],'
            ' question: "What is the capital of {}?"}\n'
            "facts:\n"
            "- {subject: France, relation: capital, target: Lyon}\n"
            "- {subject: Spain, relation: capital, target: Porto,"
            ' wordings: ["Own words of {} are"], question: "Q {}?"}\n',
        )
    )
    assert [fact.wordings for fact in file.facts] == [
        ("Rule comes from, in {},",),
        ("Own words of {} are", "Rule comes from, in {},"),
    ]
    assert [fact.question for fact in file.facts] == ["What is the capital of {}?", "Q {}?"]
    assert [Fact.from_dict(fact.to_dict()) for fact in file.facts] == list(file.facts)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ('wordings: ["no slot"]', "it needs {}"),
        ('wordings: ["{} and {}"]', "2 {}"),
        ('wordings: ["By {} is"], paraphrases: ["By France is"]', "it is learned, so it measures nothing"),
        ('wordings: ["By {} is"], paraphrases: ["By {}  is"]', "it is learned, so it measures nothing"),
        ("wordings: one", "expected a list"),
    ],
)
def test_wrong_wordings_are_named(tmp_path: Path, extra: str, said: str) -> None:
    path = written(tmp_path, f'facts:\n- {{subject: France, prompt: "To {{}} is", target: x, {extra}}}\n')
    with pytest.raises(BadInput) as error:
        load_facts(path)
    assert said in "\n".join([error.value.message, *error.value.details])
