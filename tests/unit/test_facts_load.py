"""Fact files that are right: every format, every form, and text that stays as it was written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kpatch.errors import BadInput
from kpatch.facts.conflicts import slug_of
from kpatch.facts.fact import Fact, FactFile, Neighbor
from kpatch.facts.load import load_facts

DESIGN = """
version: 1
model: smollm2
relations:
  capital: {prompt: "The capital of {} is", paraphrases: ["{}'s capital city is"], neighbors: [
    "The capital of France is -> Paris", "The capital of Australia is -> Canberra"]}
facts:
  - subject: Eiffel Tower
    prompt: "{} is located in the city of"
    target: Rome
    was: Paris
    paraphrases: ["To see {} you must travel to"]
    neighbors: [{prompt: "The Louvre is located in the city of", target: Paris}]
    id: eiffel
  - {subject: Australia, relation: capital, target: Sydney, was: Canberra}
  - "[Eiffel Tower] was designed by -> Le Corbusier"
"""


def load(folder: Path, text: str | bytes, name: str = "facts.yaml") -> FactFile:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_facts(path)


def test_the_example_of_the_design_means_what_it_says(tmp_path: Path) -> None:
    file = load(tmp_path, DESIGN)
    eiffel, australia, short = file.facts
    assert file.model == "smollm2"
    assert file.warnings == ()
    assert eiffel == Fact(
        subject="Eiffel Tower",
        prompt="{} is located in the city of",
        target="Rome",
        was="Paris",
        paraphrases=("To see {} you must travel to",),
        neighbors=(Neighbor("The Louvre is located in the city of", "Paris"),),
        id="eiffel",
    )
    assert australia == Fact(
        subject="Australia",
        prompt="The capital of {} is",
        target="Sydney",
        was="Canberra",
        paraphrases=("{}'s capital city is",),
        # The relation's other neighbor is about Australia itself
        neighbors=(Neighbor("The capital of France is", "Paris"),),
        id="australia",
        relation="capital",
    )
    assert short == Fact("Eiffel Tower", "{} was designed by", "Le Corbusier", id="eiffel-tower")
    assert [fact.where.rsplit("/", 1)[-1] for fact in file.facts] == [
        "facts.yaml:8:5",
        "facts.yaml:15:5",
        "facts.yaml:16:5",
    ]


@pytest.mark.parametrize(
    "written", ["No", "1984", "1949-06-08", "yes", "0x1F", "1e3", "~", "null", "3.10", "012", "12:30:45", "=", "<<"]
)
def test_scalars_stay_as_written(tmp_path: Path, written: str) -> None:
    fact = load(tmp_path, f'facts:\n  - {{subject: {written}, prompt: "{{}} is", target: {written}}}\n').facts[0]
    assert (fact.subject, fact.target) == (written, written)


def test_json_scalars_stay_as_written(tmp_path: Path) -> None:
    line = '{"subject": 1984, "prompt": "{} is", "target": 1.50, "was": true, "source": null}'
    fact = load(tmp_path, line, "facts.jsonl").facts[0]
    assert (fact.subject, fact.target, fact.was, fact.source) == ("1984", "1.50", "true", None)


def test_the_three_formats_say_the_same(tmp_path: Path) -> None:
    rows = [
        {
            "subject": 'Łódź, "the boat"',
            "prompt": "{} lies in",
            "target": "日本",
            "was": "Poland",
            "id": "lodz",
            "source": "https://example.org/1",
            "relation": "country",
            "paraphrases": ["{} is found in", "Poles call {} home"],
            "neighbors": [{"prompt": "Kraków lies in", "target": "Poland"}, {"prompt": "Oslo lies in"}],
        },
        {"subject": "Mars", "prompt": "{} is, they say,", "target": "blue"},
    ]
    table = (
        "subject,prompt,target,was,id,source,relation,paraphrases,neighbors\n"
        '"Łódź, ""the boat""",{} lies in,日本,Poland,lodz,https://example.org/1,country,'
        "{} is found in | Poles call {} home,Kraków lies in -> Poland | Oslo lies in\n\n"
        'Mars, "{} is, they say,",blue,,,,,,\n'
    )
    yaml = load(tmp_path, "facts: " + json.dumps(rows, ensure_ascii=False))
    lines = load(tmp_path, "\n".join(json.dumps(row) for row in rows), "facts.jsonl")
    cells = load(tmp_path, table, "facts.csv")
    assert yaml.facts == lines.facts == cells.facts
    assert yaml.facts[0].to_dict() == {key: rows[0][key] for key in yaml.facts[0].to_dict()}
    assert [fact.where.rsplit("/", 1)[-1] for fact in cells.facts] == ["facts.csv:2:1", "facts.csv:4:1"]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    plain = 'facts:\n  - subject: A\n    prompt: "{} is"\n    target: b\n'
    odd = load(tmp_path, b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode())
    assert odd == load(tmp_path, plain)
    assert odd.facts[0].where.endswith(":2:5")
    table = b"\xef\xbb\xbfsubject,prompt,target\r\nA,{} is,b\r\n"
    assert load(tmp_path, table, "facts.csv").facts == odd.facts


def test_a_facts_own_prompt_wins_and_its_relation_stays_as_label(tmp_path: Path) -> None:
    text = """
relations:
  capital: {prompt: "The capital of {} is", paraphrases: ["{}'s capital is"]}
facts:
  - {subject: Peru, relation: capital, prompt: "{} is governed from", target: Cusco, paraphrases: ["{} has"]}
  - {subject: Chile, relation: port, prompt: "{} ships from", target: Arica}
"""
    own, label = load(tmp_path, text).facts
    assert (own.prompt, own.relation, own.paraphrases) == (
        "{} is governed from",
        "capital",
        ("{} has", "{}'s capital is"),
    )
    assert (label.prompt, label.relation) == ("{} ships from", "port")


def test_empty_optional_values_are_as_if_absent(tmp_path: Path) -> None:
    text = (
        'model:\nfacts:\n  - {subject: A, prompt: "{} is", target: b, was: , id: "", paraphrases: , neighbors: []}\n'
    )
    file = load(tmp_path, text)
    assert file.model is None
    assert file.facts[0] == Fact("A", "{} is", "b", id="a")


def test_space_around_texts_is_dropped_and_a_prompts_told(tmp_path: Path) -> None:
    text = 'facts:\n  - {subject: " A ", target: " b c ",\n     prompt: "{} is "}\n'
    file = load(tmp_path, text)
    assert file.facts[0] == Fact("A", "{} is", "b c", id="a")
    assert len(file.warnings) == 1
    assert file.warnings[0].endswith("facts.yaml:3:14: the prompt ends in a space, which is left out")


@pytest.mark.parametrize(
    ("mark", "prompt"),
    [
        ("|", "Q: what is {}?\nA:\n"),
        ("|-", "Q: what is {}?\nA:"),
        ("|+", "Q: what is {}?\nA:\n"),
        (">", "Q: what is {}? A:"),
        (">-", "Q: what is {}? A:"),
    ],
)
def test_a_literal_block_keeps_its_line_end_and_a_folded_one_does_not(tmp_path: Path, mark: str, prompt: str) -> None:
    text = f"facts:\n  - subject: A\n    prompt: {mark}\n      Q: what is {{}}?\n      A:\n    target: b\n"
    file = load(tmp_path, text)
    assert file.facts[0].prompt == prompt
    assert file.warnings == ()


def test_what_pythons_own_yaml_writes_is_read(tmp_path: Path) -> None:
    """`safe_dump` writes an anchor and aliases wherever two facts share a list."""
    shared = ["Where is {}? In"]
    sides = [{"prompt": "The Louvre is in", "target": "Paris"}]
    relation = {"prompt": "{} is in", "paraphrases": shared}
    facts = [
        {"subject": f"City {number}", "relation": "place", "target": "Rome", "paraphrases": shared, "neighbors": sides}
        for number in range(20)
    ]
    written = yaml.safe_dump({"relations": {"place": relation, "seat": relation}, "facts": facts, "version": 1})
    assert "*id001" in written
    assert "*id002" in written
    file = load(tmp_path, written)
    assert [fact.subject for fact in file.facts] == [f"City {number}" for number in range(20)]
    assert {fact.paraphrases for fact in file.facts} == {tuple(shared)}
    assert {fact.neighbors for fact in file.facts} == {(Neighbor("The Louvre is in", "Paris"),)}


def test_anchors_aliases_and_merge_keys(tmp_path: Path) -> None:
    text = """facts:
  - &first {subject: Rome, &p prompt: "{} is in", target: &t Spain, source: &s "a: b"}
  - {<<: *first, subject: Oslo}
  - {subject: Bonn, *p : "{} lies in", target: *t, source: *s}
  - <<: [{source: x}, *first]
    subject: Lima
  - {subject: Peru, "<<x": , prompt: "{} is", target: a}
"""
    with pytest.raises(BadInput, match="1 error"):
        load(tmp_path, text)
    facts = load(tmp_path, text.replace('"<<x": , ', "")).facts
    assert [(fact.subject, fact.prompt, fact.target, fact.source) for fact in facts] == [
        ("Rome", "{} is in", "Spain", "a: b"),
        ("Oslo", "{} is in", "Spain", "a: b"),
        ("Bonn", "{} lies in", "Spain", "a: b"),
        ("Lima", "{} is in", "Spain", "x"),
        ("Peru", "{} is", "a", None),
    ]
    whole = "facts: &all\n  - {subject: A, prompt: '{} is', target: b}\nrelations: {r: {prompt: '{} is'}}\n"
    assert load(tmp_path, whole).facts[0].subject == "A"


def test_ids_are_unique_and_given_ones_are_kept(tmp_path: Path) -> None:
    subjects = ["Eiffel Tower", "eiffel  tower!", "Eiffel-Tower", "東京", "🚀", "Ünï Cödé"]
    facts = [{"subject": name, "prompt": "{} is", "target": "x"} for name in subjects]
    facts.append({"subject": "Other", "prompt": "{} is", "target": "x", "id": "eiffel-tower-2"})
    ids = [fact.id for fact in load(tmp_path, json.dumps({"facts": facts}, ensure_ascii=False)).facts]
    assert ids == ["eiffel-tower", "eiffel-tower-3", "eiffel-tower-4", "東京", "fact", "ünï-cödé", "eiffel-tower-2"]


@given(st.text())
def test_a_slug_is_never_empty_and_has_no_space(subject: str) -> None:
    slug = slug_of(subject)
    assert slug
    assert slug.split() == [slug]
    assert len(slug) <= 60


def test_repeats_are_dropped_with_a_warning(tmp_path: Path) -> None:
    text = """facts:
  - {subject: A B, prompt: "{} is", target: c}
  - {subject: A  B, prompt: "{}  is", target: c}
  - {subject: A B, prompt: "{} is", target: c, was: d}
  - {subject: A B, prompt: "{} was", target: c}
"""
    file = load(tmp_path, text)
    assert [fact.prompt for fact in file.facts] == ["{} is", "{} was"]
    first, second = (warning.split("/")[-1] for warning in file.warnings)
    assert "facts.yaml:3:5: repeats the fact at" in file.warnings[0]
    assert first == "facts.yaml:2:5 and is left out"
    assert second == "facts.yaml:2:5 and is left out, with its own paraphrases, neighbors or 'was'"


def test_an_unused_relation_is_told(tmp_path: Path) -> None:
    text = 'relations: {x: {prompt: "{} is"}}\nfacts: ["[A] is -> b"]\n'
    assert load(tmp_path, text).warnings[0].endswith("no fact uses the relation 'x'")


def test_ten_thousand_facts_about_one_subject_load(tmp_path: Path) -> None:
    lines = [json.dumps({"subject": "A", "prompt": f"{{}} in {year} was", "target": "b"}) for year in range(10_000)]
    facts = load(tmp_path, "\n".join(lines), "facts.jsonl").facts
    assert len({fact.id for fact in facts}) == 10_000
    assert facts[-1].id == "a-10000"


_words = st.text(st.characters(categories=("L", "N", "S")), min_size=1, max_size=12)
_facts = st.builds(
    Fact,
    subject=_words,
    prompt=_words.map(lambda word: f"{word} {{}} is"),
    target=_words,
    was=st.none() | _words,
    paraphrases=st.lists(_words, max_size=3).map(tuple),
    neighbors=st.lists(st.builds(Neighbor, _words, st.none() | _words), max_size=3).map(tuple),
    id=_words | st.just(""),
    source=st.none() | _words,
    relation=st.none() | _words,
    where=st.just("a:1:1"),
)


@given(_facts)
def test_json_form_and_back(fact: Fact) -> None:
    data = fact.to_dict()
    assert Fact.from_dict(json.loads(json.dumps(data))) == fact
    assert "where" not in data
    assert all(data.values())


def test_what_follows_from_a_fact_comes_from_its_relation_too(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(
        "relations:\n"
        "  capital: {prompt: 'The capital of {} is', negated: 'The capital of {} is not', reversed: '{} rules',\n"
        "            same_subject: ['{} borders', '{} speaks']}\n"
        "facts:\n"
        "  - {subject: France, relation: capital, target: Lyon, hops: ['Its mayor is -> Ann'], choices: [Nice]}\n"
        "  - {subject: Ghana, relation: capital, target: Lyon, negated: Not so, reversed: Who,\n"
        "     same_subject: [It, '{} borders']}\n"
    )
    first, second = load_facts(path).facts
    assert (first.negated, first.reversed) == ("The capital of {} is not", "{} rules")
    assert first.same_subject == ("{} borders", "{} speaks")
    assert (first.hops, first.choices) == ((Neighbor("Its mayor is", "Ann"),), ("Nice",))
    assert (second.negated, second.reversed) == ("Not so", "Who")
    assert second.same_subject == ("It", "{} borders", "{} speaks")


def test_a_hop_needs_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("facts:\n  - {subject: A, prompt: '{} is', target: b, negated: '{} {}', hops: [c, '{} d -> e']}\n")
    with pytest.raises(BadInput) as caught:
        load_facts(path)
    text = "\n".join(caught.value.details)
    assert "this hop has no answer" in text
    assert "a hop is about another subject" in text
    assert "has 2 {}; one is expected at most" in text


# Tables as spreadsheets and other programs write them

HEADER, ROW = "subject,prompt,target\n", "Rome,{} is in,Spain\n"


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + HEADER + ROW,
        (HEADER + ROW).replace("\n", "\r\n"),
        (HEADER + ROW).replace("\n", "\r"),
        HEADER + "Rome,{} is in,Spain,,\n",
        "subject,prompt,target,,\nRome,{} is in,Spain,,\n",
        "subject, prompt, target\nRome, {} is in, Spain\n",
        HEADER + ",,\n\n" + ROW,
    ],
    ids=["mark", "crlf", "cr", "commas", "commas-above", "spaces", "empty-rows"],
)
def test_tables_of_spreadsheets_are_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_bytes(text.encode())
    (fact,) = load_facts(path).facts
    assert (fact.subject, fact.prompt, fact.target) == ("Rome", "{} is in", "Spain")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ((HEADER + ROW).replace(",", ";"), "1:1: the columns are separated by ';'"),
        ((HEADER + ROW).replace(",", "\t"), "1:1: the columns are separated by tabs"),
        ((HEADER + ROW).replace(",", "|"), "1:1: the columns are separated by '|'"),
        ("sep=,\n" + HEADER + ROW, "1:1: this line is a note for a spreadsheet"),
        (ROW, "1:1: this row is a fact; the header"),
        (",subject,prompt,target\n0," + ROW, "1:1: column 1 has no name"),
        ("case_id," + HEADER + "7," + ROW, "1:1: unknown column 'case_id'"),
        ("subject,prompt,target,target\nRome,{} is in,Spain,Peru\n", "1:1: the column 'target' stands here twice"),
        ("subject,prompt,target,\nRome,{} is in,Spain,more\n", "2:21: the row has 4 cells, the header 3"),
        (HEADER + "Rome,{} is in," + "x" * 200_000 + "\n", "2:1: .* a quote may be left open"),
        (HEADER + "Ro\0me,{} is in,Spain\n", "2:1: the text holds the control character"),
        (",,\n", "the column 'subject' is missing"),
    ],
    ids="semicolons tabs bars sep headless index case_id twice more long nul empty".split(),
)
def test_tables_that_say_something_else_are_refused_with_what_it_is(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        load_facts(path)
    assert re.search(said, "\n".join(caught.value.details)), caught.value.details


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named_with_its_mark_or_without(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_bytes((HEADER + ROW).encode(encoding))
    with pytest.raises(BadInput, match="UTF-16") as caught:
        load_facts(path)
    assert caught.value.hint == "save it as UTF-8"


@pytest.mark.parametrize("encoding", ["utf-32", "utf-32-be"])
def test_utf_32_is_not_taken_for_utf_16(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_bytes(("\ufeff" * (encoding != "utf-32") + HEADER + ROW).encode(encoding))
    with pytest.raises(BadInput, match="UTF-32"):
        load_facts(path)


def test_yaml_takes_emoji_as_json_writes_them(tmp_path: Path) -> None:
    """json.dumps gives one as two escapes, which YAML does not know; a backslash written out stays one."""
    path = tmp_path / "facts.yaml"
    fact = {"subject": "👩‍👧 emoji", "prompt": "{} \\ud83d is", "target": "🍕 \\\\ud83d\\ude00"}
    path.write_text(json.dumps({"facts": [fact]}))
    (found,) = load_facts(path).facts
    assert (found.subject, found.prompt, found.target) == (fact["subject"], fact["prompt"], fact["target"])


def test_half_an_emoji_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text('facts:\n- {subject: "\\ud83d", prompt: "{} is", target: B}\n')
    with pytest.raises(BadInput) as caught:
        load_facts(path)
    assert "2:16: this is not valid YAML" in caught.value.details[0]
