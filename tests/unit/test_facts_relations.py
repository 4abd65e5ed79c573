"""The library of relations: what it recognizes, and that no prompt is taken for another relation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kpatch.facts.fact import SLOT
from kpatch.facts.relations import Relation, phrasings, relation_of, relations, with_article, wordings_for

LIBRARY = relations()
COMMON = (
    "capital location continent born_in died_in citizenship occupation employer instrument sport position_played "
    "native_language speaks founded_by author currency head_of_state headquarters field_of_work religion genre "
    "director developer manufacturer owner named_after twin_city official_language original_language premiered_on"
).split()
KINDS = {
    *("animal", "artwork", "book", "building", "character", "city", "company", "country", "deity", "element", "event"),
    *("film", "invention", "mountain", "music", "musician", "organization", "person", "place", "product", "programme"),
    *("region", "river", "software", "song", "species", "star", "team", "thing", "work"),
}


def named(prompt: str) -> str | None:
    found = relation_of(prompt)
    return found.name if found else None


def test_the_library_is_large_and_has_the_common_relations() -> None:
    assert len(LIBRARY) >= 70
    assert [name for name in COMMON if name not in LIBRARY] == []
    assert {relation.kind for relation in LIBRARY.values()} == KINDS


@pytest.mark.parametrize("relation", LIBRARY.values(), ids=LIBRARY)
def test_wordings_and_question_of_a_relation(relation: Relation) -> None:
    texts = (relation.question, *relation.wordings)
    assert len(relation.wordings) >= 5
    assert len({text.lower() for text in texts}) == len(texts)
    assert [text for text in texts if text.count(SLOT) != 1 or re.search(r"[(|)]|\s\s|^\s|\s$", text)] == []
    assert relation.question.endswith("?")
    assert [text for text in relation.wordings if text.endswith("?")] == []
    assert sum(not text.startswith(SLOT) for text in relation.wordings) * 2 >= len(relation.wordings)


def test_reverses_and_phrases() -> None:
    reverses = {name: one.reverse for name, one in LIBRARY.items() if one.reverse}
    phrases = {name: one.phrase for name, one in LIBRARY.items() if one.phrase}
    assert {"capital", "spouse", "mayor"} <= reverses.keys() & phrases.keys()
    texts = [*reverses.values(), *phrases.values()]
    assert [text for text in texts if text.count(SLOT) != 1 or re.search(r"[(|)]|\s\s|^\s|\s$", text)] == []
    assert [text for text in reverses.values() if not text.endswith("?")] == []
    assert [text for text in phrases.values() if not text.startswith("the ")] == []
    # A job, a language or a color is that of many
    assert not {"occupation", "native_language", "color", "author", "born_in"} & reverses.keys()
    assert not {"child", "sibling", "award", "borders", "speaks", "cast_member"} & phrases.keys()


@pytest.mark.parametrize("name", LIBRARY)
def test_every_phrasing_is_matched_as_its_own_relation(name: str) -> None:
    """So no two relations share one: it would be matched as only one of them."""
    prompts = phrasings(name)
    assert len(prompts) >= 9  # three patterns, a question, five wordings
    assert [prompt for prompt in prompts if prompt.count(SLOT) != 1 or re.search(r"[(|)]", prompt)] == []
    assert {prompt: named(prompt) for prompt in prompts if relation_of(prompt) != LIBRARY[name]} == {}


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("The capital of {} is", "capital"),
        ("the  CAPITAL of {}, is:", "capital"),
        ("{}’s capital is", "capital"),
        ("{}' capital is", "capital"),  # a subject that ends in s
        ("The capital of the country of {} is the city of", "capital"),
        ("What is the capital of {}? It is", "capital"),
        ("{} was born in", "born_in"),
        ("The famous actor {} was born in the city of", "birth_city"),
        ("{} was born on", "birth_date"),
        ("{} was born in the year", "birth_year"),
        ("{} is located in", "location"),
        ("{} is located in the city of", "city_of_place"),
        ("{} is located in the country of", "country_of_place"),
        ("{} lies on the continent of", "continent"),
        ("{} plays the", "instrument"),
        ("{} plays", "plays"),
        ("{}, playing the", "instrument"),
        ("{} plays as", "position_played"),
        ("{} plays for", "team"),
        ("{} plays the sport of", "sport"),
        ("{} is a professional", "sport"),
        ("{}'s profession is an", "occupation"),
        ("{}'s position is", "position_held"),
        ("The position of {} is what?", "position_held"),
        ("{} died of", "death_cause"),
        ("{} died at", "death_place"),
        ("{} works for", "employer"),
        ("{} works as a", "occupation"),
        ("{} works in the field of", "field_of_work"),
        ("{} works in", "work_location"),
        ("{} was written by", "author"),
        ("{} was written in", "language_of_work"),
        ("{} was written in the programming language", "programming_language"),
        ("{} was founded by", "founded_by"),
        ("{} was founded in", "founded_in"),
        ("The company {} was founded by", "founded_by"),
        ("The mother tongue of {} is", "native_language"),
        ("The mother of {} is", "mother"),
        ("{} is made of", "material"),
        ("{} is made by", "maker"),
    ],
)
def test_what_a_prompt_says(prompt: str, name: str) -> None:
    assert named(prompt) == name


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        SLOT,
        "{} is a",
        "{}, the",
        "{} of",
        "no slot at all",
        "The author of {} was born in",
        "Once upon a time, {}",
    ],
)
def test_what_says_nothing(prompt: str) -> None:
    assert relation_of(prompt) is None
    assert wordings_for(prompt) == ()


def test_an_unclear_prompt_gets_wordings_that_stay_unclear() -> None:
    """A city, a country and a year may all follow "{} was born in", so no wording names one of them."""
    for name in ("born_in", "died_in", "founded_in", "location", "origin"):
        told = " ".join(LIBRARY[name].wordings).lower().split()
        assert {"city", "country", "year", "town", "continent"} & set(told) == set()


def test_wordings_leave_out_the_prompt_and_what_is_only_asked() -> None:
    every = LIBRARY["capital"].wordings
    assert wordings_for("The capital of {} is") == every
    assert wordings_for("The capital of {} is", count=2) == every[:2]
    assert wordings_for("The capital of {} is", count=0) == ()
    assert wordings_for(every[1].upper(), count=2) == (every[0], every[2])
    assert wordings_for("The capital of {} is", [every[0].lower() + " the", "{} is big"], 2) == every[1:3]


def test_a_wording_and_its_target_bring_one_article() -> None:
    wordings = wordings_for("The currency of {} is")
    assert [text for text in wordings if text.endswith(" the")] != []
    bare = wordings_for("The currency of {} is", target="the euro")
    assert [text.removesuffix(" the") for text in wordings] == list(bare)


def test_reading_is_lazy_and_needs_no_torch() -> None:
    code = (
        "import sys; from kpatch.facts import relations as r; assert r._entries.cache_info().currsize == 0; "
        "assert r.relation_of('The capital of {} is').name == 'capital'; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_data_files_go_into_the_wheel() -> None:
    root = Path(__file__).parents[2]
    told = re.search(r"package-data\]\nkpatch = (\[.*\])", (root / "pyproject.toml").read_text())
    assert told is not None
    patterns = ast.literal_eval(told[1])
    held = {path for pattern in patterns for path in (root / "kpatch").glob(pattern)}
    data = {path for path in (root / "kpatch").rglob("*") if path.suffix in (".yaml", ".json", ".txt")}
    assert data - held == set()


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [
        ("The {} is located in", "The ", "the "),
        ("You will find the {} in", "The ", "the "),
        ("A {} is located in", "A ", "a "),
        ("{} is located in", "", ""),
    ],
)
def test_a_subject_keeps_the_article_of_its_prompt(prompt: str, first: str, second: str) -> None:
    opening, inside = with_article("{} stands in", prompt), with_article("People visit {} in", prompt)
    assert (opening, inside) == (f"{first}{{}} stands in", f"People visit {second}{{}} in")
    assert with_article("The {} stands in", prompt) == "The {} stands in"


def test_wordings_keep_the_article_and_mean_the_same_relation() -> None:
    plain, articled = wordings_for("{} is located in"), wordings_for("The {} is located in")
    assert len(articled) == len(plain) > 0
    assert all("the {}" in wording.lower() for wording in articled)
    assert {relation_of(wording) for wording in articled} == {relation_of("{} is located in")}
