"""The built-in facts, and known-facts files."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
import yaml

from kpatch.errors import BadInput
from kpatch.facts.fact import SLOT
from kpatch.trace.fact_lists import built_in, read_facts, slotted

ROOT = Path(__file__).parents[2]


def test_the_built_in_list_is_large_and_wide() -> None:
    facts = built_in()
    relations = Counter(fact.relation for fact in facts)
    assert len(facts) >= 600
    assert len(relations) >= 15
    assert min(relations.values()) >= 8
    assert len({fact.id for fact in facts}) == len(facts)
    assert len({fact.text() for fact in facts}) == len(facts)


def test_every_built_in_fact_is_whole() -> None:
    for fact in built_in():
        assert fact.prompt.count(SLOT) == 1
        assert not fact.prompt.endswith(" ")
        for text in (fact.subject, fact.target):
            assert text == text.strip()
            assert text
            assert text[0] not in "'\"{[&*!|>%@`", "YAML would read it as something else"


def test_no_built_in_subject_gives_its_object_away() -> None:
    """Copying is not recalling. Symbols of elements are letters of their names."""
    for fact in built_in():
        if fact.relation != "symbol":
            assert fact.target.split()[0].lower() not in fact.subject.lower(), fact.text()


def test_no_subject_stands_twice_in_a_relation() -> None:
    """YAML would keep the second one and say nothing."""
    tree = yaml.compose(resources.files("kpatch.trace").joinpath("known.yaml").read_text(encoding="utf-8"))
    names = [name.value for name, _ in tree.value]
    assert len(set(names)) == len(names)
    for _, relation in tree.value:
        facts = {key.value: value for key, value in relation.value}["facts"]
        subjects = [subject.value for subject, _ in facts.value]
        assert not [subject for subject, count in Counter(subjects).items() if count > 1]


def test_the_list_is_packed_with_the_package() -> None:
    assert '"trace/*.yaml"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


KNOWN = {
    "known_id": 7,
    "subject": "Space Needle",
    "attribute": "Seattle",
    "template": "{} is in",
    "prompt": "The Space Needle is in",
    "relation_id": "P1",
}


def test_a_known_facts_file(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    path.write_text(json.dumps([KNOWN, {**KNOWN, "known_id": 8, "subject": "Needle"}]), encoding="utf-8")
    first, second = read_facts(path).facts
    assert (first.subject, first.prompt, first.target) == ("Space Needle", "The {} is in", "Seattle")
    assert (first.id, first.relation) == ("7", "P1")
    assert second.prompt == "The Space {} is in"


def test_a_fact_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("subject,prompt,target\nSpace Needle,The {} is in,Seattle\n", encoding="utf-8")
    assert [fact.text() for fact in read_facts(path).facts] == ["The Space Needle is in"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("{}", "JSON list"),
        ("[]", "JSON list"),
        ("[1]", "'subject', 'attribute' and 'prompt'"),
        (json.dumps([{**KNOWN, "attribute": 3}]), "'subject', 'attribute' and 'prompt'"),
        (json.dumps([{**KNOWN, "subject": "  "}]), "'subject', 'attribute' and 'prompt'"),
        (json.dumps([KNOWN, {**KNOWN, "subject": "Eiffel Tower"}]), "record 1: the subject 'Eiffel Tower' is not in"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_known_facts_files_get_wrong(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        read_facts(path)
    assert said in " ".join([caught.value.message, *caught.value.details])
    assert caught.value.where == str(path)


def test_a_known_facts_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_facts(tmp_path / "known.json")


def test_a_prompt_with_the_subject_in_words() -> None:
    assert slotted("The {} is in", "Space Needle") == "The {} is in"
    assert slotted("The Space Needle is in", " Space Needle ") == "The {} is in"
    for prompt, subject in [("The Louvre is in", "Space Needle"), ("{} and {}", "x"), ("The", " "), ("", "x")]:
        with pytest.raises(BadInput, match="is not in the prompt"):
            slotted(prompt, subject)
