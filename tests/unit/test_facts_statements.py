"""Questions said as statements, and what is no question about a subject."""

from __future__ import annotations

import pytest

from kpatch.facts.fact import SLOT
from kpatch.facts.grammar import asked, reworded
from kpatch.facts.relations import relations
from kpatch.facts.statements import statements_of


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("In which city was {} born?", ("{} was born in the city of", "The city in which {} was born is")),
        (
            "in what  city was the {} built?",
            ("The {} was built in the city of", "The city in which the {} was built is"),
        ),
        ("On which continent is {}?", ("{} is on the continent of",)),
        ("Which sport does {} play?", ("{} plays the sport of", "The sport that {} plays is")),
        ("Which team did {} play for?", ("{} played for the team", "The team that {} played for is")),
        ("Where did {} study?", ("{} studied in", "The place where {} studied is")),
        ("Whom did {} marry?", ("{} married",)),
        ("What college did {} go to?", ("{} went to the college", "The college that {} went to is")),
        ("Who carries {}?", ("{} is carried by", "The one who carries {} is")),
        ("What year did {} die?", ("{} died in the year", "The year in which {} died is")),
        (
            "On what channel did {} first appear?",
            ("{} first appeared on the channel", "The channel on which {} first appeared is"),
        ),
        ("What war was {} in?", ("{} was in the war", "The war that {} was in is")),
        ("In what war was {} in?", ("{} was in the war", "The war that {} was in is")),
        ("Which state is {} located?", ("{} is located in the state of", "The state in which {} is located is")),
        ("What voice does {} have?", ("{} has the voice", "The voice that {} has is")),
        ("What color is {}?", ("The color of {} is",)),
        ("Which city was the birthplace of {}?", ("The city that was the birthplace of {} is",)),
        ("In which city are the headquarters of {}?", ("The headquarters of {} are in the city of",)),
        ("Who is {} married to?", ("{} is married to",)),
        ("To whom is {} married?", ("{} is married to",)),
        ("What is {} made of?", ("{} is made of", "What {} is made of is")),
        ("What does {} carry?", ("{} carries", "What {} carries is")),
        ("Where is {}?", ("{} is in",)),
        ("Where does {} come from?", ("{} comes from", "The place where {} comes from is")),
        ("When was {} founded?", ("The time when {} was founded is",)),
        ("Who founded {}?", ("{} was founded by", "The one who founded {} is")),
        ("Who wrote {}?", ("{} was written by", "The one who wrote {} is")),
        ("Who acted in {}?", ("The one who acted in {} is",)),
        ("Who had the lead in {}?", ("The one who had the lead in {} is",)),
        ("Which company builds the {}?", ("The {} is built by the company", "The company that builds the {} is")),
        ("What company published {}?", ("{} was published by the company", "The company that published {} is")),
        ("What title is held by {}?", ("The title that is held by {} is",)),
        ("What killed {}?", ("{} was killed by", "What killed {} is")),
        ("What is the name of the state where {} lies?", ("The name of the state where {} lies is",)),
        ("What was the year {} was formed in?", ("The year {} was formed in was",)),
        ("What is the product made by {}?", ("The product made by {} is",)),
        ("What is the capital of {} called?", ("The capital of {} is called",)),
        ("What was the name of {}'s team?", ("The name of {}'s team was",)),
        ("The year {} died was what?", ("The year {} died was",)),
        ("{} is a member of which league?", ("{} is a member of the league",)),
    ],
)
def test_a_question_is_said_as_statements(question: str, said: tuple[str, ...]) -> None:
    assert statements_of(question) == said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "?",
        "{}",
        "{} was born in",
        "Where was Ada born?",
        "Is {} in Rome?",
        "Did {} live in which city?",
        "How tall is {}?",
        "Why did {} leave?",
        "What is {} like?",
        "What did {}?",
        "Which city {} lies in?",
        "Where did {} live when he died?",
        "Who is {} and who is {}?",
        "Who founded {}? It was",
        f"Who founded {'very ' * 50}{{}}?",
        "Где родился {}?",
    ],
)
def test_what_is_no_such_question_has_no_statement(text: str) -> None:
    assert statements_of(text) == ()


def test_the_library_s_questions_are_understood() -> None:
    """All but those that ask how much or how: so the words that people ask with are covered."""
    unknown = [one.question for one in relations().values() if not reworded(one.question)]
    assert [question for question in unknown if not question.startswith("How")] == []
    for one in relations().values():
        for said in reworded(one.question):
            assert said.count(SLOT) == 1
            assert not said.endswith("?")
            assert "  " not in said


def test_a_question_is_its_own_question() -> None:
    assert asked(" Who zorbed {}?") == "Who zorbed {}?"
