"""Other words for a prompt by its grammar: what is turned, what is put as a task, and what is left alone."""

from __future__ import annotations

import pytest

from kpatch.facts.fact import SLOT, Fact
from kpatch.facts.grammar import asked, reworded
from kpatch.facts.relations import relation_of
from kpatch.facts.wordings import LEARNED, with_grammar
from tests.support.reports import Recorder


@pytest.mark.parametrize(
    ("prompt", "first", "question"),
    [
        ("The zorb of {} is", "{}'s zorb is", "What is the zorb of {}?"),
        ("the old zorb of the {} was", "The {}'s old zorb was", "What was the old zorb of the {}?"),
        ("{}'s zorb is", "The zorb of {} is", "What is the zorb of {}?"),
        ("The {}’s zorb is", "The zorb of the {} is", "What is the zorb of the {}?"),
        (
            "The zorbs of {} are in the hills of",
            "{}'s zorbs are in the hills of",
            "Complete this sentence: The zorbs of {} are in the hills of",
        ),
    ],
)
def test_what_a_subject_has_is_said_in_three_other_ways(prompt: str, first: str, question: str) -> None:
    wordings = reworded(prompt)
    assert wordings[0] == first
    assert len(set(wordings)) == LEARNED
    assert all(wording.count(SLOT) == 1 and wording != prompt for wording in wordings)
    assert asked(prompt) == question


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [
        ("What is the zorb of {}?", "The zorb of {} is", "{}'s zorb is"),
        ("Who were the old zorbs of the {}?", "The old zorbs of the {} were", "The {}'s old zorbs were"),
        ("Which is {}'s zorb?", "The zorb of {} is", "{}'s zorb is"),
    ],
)
def test_a_question_about_what_a_subject_has_is_said_as_statements_too(prompt: str, first: str, second: str) -> None:
    wordings = reworded(prompt)
    assert wordings[:2] == (first, second)
    assert len(set(wordings)) == 4
    assert asked(prompt) == prompt


@pytest.mark.parametrize("prompt", ["{} was zorbed by", "The zorb of {} flims", "One of {} is", "The zorb {}, the"])
def test_another_build_is_put_as_a_task(prompt: str) -> None:
    assert reworded(prompt) == ()
    assert asked(prompt) == f"Complete this sentence: {prompt}"


@pytest.mark.parametrize(
    "prompt",
    [
        "{} est né à",
        "{}は",
        "Why zorbed {}?",
        "How far is the zorb of {}?",
        "What is the zorb of {} like?",
        "What is one of {}?",
        "Q: Who zorbed {}?\nA:",
        "<|im_start|>user\nWho is the zorb of {}<|im_end|>\n<|im_start|>assistant\n",
        'The zorb of {} is "',
        "The zorb of {} is:",
        f"{'very ' * 50}{{}} is",
    ],
)
def test_what_is_no_unfinished_english_sentence_is_left_alone(prompt: str) -> None:
    assert reworded(prompt) == ()
    assert asked(prompt) is None


def test_a_zorb_of_something_else_is_not_the_subject_s() -> None:
    assert reworded("The father of the king of {} was") == ()
    assert reworded("A zorb of {} is") == ()


def test_only_what_a_fact_lacks_is_filled_and_no_paraphrase_is_learned() -> None:
    bare = Fact("Bo", "The zorb of {} is", "Rome", paraphrases=("Bo's zorb is",))
    own = Fact("Bo", "The zorb of {} is", "Rome", wordings=("{} zorbs in",), question="Where does {} zorb?")
    heard = Recorder()
    found = with_grammar([bare, own, Fact("Bo", "{} est", "Rome")], heard)
    assert found[0].wordings == reworded(bare.prompt)[1 : LEARNED + 1]
    assert found[0].question == "What is the zorb of {}?"
    assert found[1] == own
    assert heard.notes == [
        "1 of 3 facts are learned in other words that the grammar of their prompt gives",
        "1 of 3 facts are learned in their prompt's words alone; the file can give others",
    ]


def test_a_paraphrase_that_asks_so_is_no_question_to_learn() -> None:
    fact = Fact("Bo", "The zorb of {} is", "Rome", paraphrases=("What is the zorb of Bo?",))
    assert with_grammar([fact])[0].question is None


def test_the_library_knows_better_than_the_grammar() -> None:
    relation = relation_of("The capital of {} is")
    assert relation is not None
    known = Fact("France", "The capital of {} is", "Lyon", wordings=relation.wordings, question=relation.question)
    assert with_grammar([known]) == (known,)
