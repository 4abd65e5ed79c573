"""Which facts are about one subject, whatever their braces hold."""

from __future__ import annotations

from kpatch.facts.fact import Fact
from kpatch.facts.subjects import by_subject, names_of


def test_a_subject_goes_by_its_name_with_the_article_and_by_all_that_stands_before_it() -> None:
    assert names_of("Louvre", "See the {} in") == {"Louvre", "the Louvre", "See the Louvre"}
    assert names_of("The  Louvre", "{} is in") == {"the Louvre"}
    assert names_of("Rome") == {"Rome"}


def test_facts_are_grouped_by_any_name_they_share() -> None:
    facts = [
        Fact("Louvre", "The {} is in", "Rome"),
        Fact("Oslo", "{} is in", "Peru"),
        Fact("The Louvre", "{} was built in", "1984"),
        Fact("Louvre", "{}'s town is", "Rome"),
        Fact("oslo", "{} is near", "Peru"),
        Fact("York", "New {} is near", "Peru"),
        Fact("New York", "{} is near", "Peru"),
    ]
    assert by_subject(facts) == [[0, 2, 3], [1], [4], [5, 6]]
    assert by_subject([]) == []


def test_facts_that_meet_through_a_third_are_one_group() -> None:
    facts = [Fact("A", "x {}", "b"), Fact("the B", "{}", "c"), Fact("B", "the {}", "d"), Fact("B", "x {}", "e")]
    assert by_subject(facts) == [[0], [1, 2, 3]]
