"""Records and files that cannot be imported whole: every one is named, and nothing is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kpatch.errors import BadInput, Refused
from kpatch.facts.fact import Neighbor
from kpatch.facts.importers.read import import_facts
from kpatch.facts.load import load_facts
from kpatch.facts.write import write_facts
from tests.unit.test_facts_import import COUNTERFACT, EASYEDIT, ZSRE, imported

# What breaks a rule


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subject": "Bern"}, "does not contain the subject 'Bern'"),
        ({"target_new": ""}, "'target' is missing"),
        ({"prompt": None}, "'prompt' is missing"),
        ({"prompt": ["Basel"]}, "expected text for the prompt, found list"),
        ({"prompt": "{} lies on {}"}, "the prompt has 2 {}"),
        ({"target_new": "El\x00be"}, "control character U+0000"),
        ({"locality_prompt": "{} lies on"}, "write it out instead of {}"),
        ({"locality_prompt": ["a", "b"], "locality_ground_truth": ["c"]}, "2 neighborhood prompts have 1 answers"),
    ],
)
def test_a_record_that_breaks_a_rule_is_listed(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    found = imported(tmp_path, EASYEDIT, {**EASYEDIT, "case_id": 9, **change}, format="easyedit")
    assert (found.records, len(found.facts)) == (2, 1)
    (line,) = found.rejected
    assert line.startswith("record 2 (case_id 9): ")
    assert said in line


def test_a_record_of_another_form_is_listed(tmp_path: Path) -> None:
    found = imported(tmp_path, COUNTERFACT, EASYEDIT, "text", {**COUNTERFACT, "requested_rewrite": 5})
    assert len(found.facts) == 1
    assert [line.partition(":")[0] for line in found.rejected] == [
        "record 2 (case_id 7)",
        "record 3",
        "record 4 (case_id 7)",
    ]


def test_every_record_is_accounted_for(tmp_path: Path) -> None:
    again = {**EASYEDIT, "case_id": 8}
    other = {**EASYEDIT, "case_id": 9, "target_new": "Oder"}
    broken = {**EASYEDIT, "case_id": 10, "subject": "Bern"}
    found = imported(tmp_path, EASYEDIT, again, other, broken)
    assert [fact.target for fact in found.facts] == ["Elbe", "Oder"]
    assert [len(found.rejected), len(found.repeats), len(found.conflicts)] == [1, 1, 1]
    assert "record 2 (case_id 8): repeats the fact at record 1 (case_id 7)" in found.repeats[0]
    assert "record 3 (case_id 9): 'Basel' -> 'Oder' contradicts 'Elbe'" in found.conflicts[0]
    fewer = imported(tmp_path, EASYEDIT, again, other, broken, drop_conflicts=True)
    assert [fact.target for fact in fewer.facts] == ["Elbe"]
    assert fewer.conflicts == found.conflicts


def test_facts_that_contradict_are_loaded_only_when_asked(tmp_path: Path) -> None:
    facts = imported(tmp_path, EASYEDIT, {**EASYEDIT, "target_new": "Oder"}).facts
    path = tmp_path / "facts.yaml"
    write_facts(path, facts)
    with pytest.raises(Refused, match="contradict"):
        load_facts(path)
    file = load_facts(path, conflicts=True)
    assert [fact.target for fact in file.facts] == ["Elbe", "Oder"]
    assert "'Basel' -> 'Oder'" in file.warnings[0]


def test_ids_are_unique_where_the_set_repeats_them(tmp_path: Path) -> None:
    other = {**EASYEDIT, "subject": "Bern", "prompt": "Bern lies on the river"}
    facts = imported(tmp_path, EASYEDIT, other).facts
    assert [fact.id for fact in facts] == ["7", "bern"]


def test_limit(tmp_path: Path) -> None:
    other = {**EASYEDIT, "subject": "Bern", "prompt": "Bern lies on the river"}
    found = imported(tmp_path, EASYEDIT, other, limit=1)
    assert (found.records, len(found.facts)) == (1, 1)


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("[", {}, "not valid JSON"),
        (json.dumps([EASYEDIT, EASYEDIT]), {"limit": -1}, "`limit` -1 takes no record"),
        ("[]", {}, "no records"),
        ("3", {}, "no records"),
        ("[" * 100_000, {}, "nested too deeply"),
        ('[{"a": 1}]', {}, "no form that is known"),
        (json.dumps([EASYEDIT]), {"format": "conterfact"}, "'conterfact' is not known"),
        (json.dumps([EASYEDIT]), {"format": "zsre"}, "No record of data.json is a fact"),
        (json.dumps([EASYEDIT]), {"target": "alt"}, "`target` is for zsRE"),
        (json.dumps([ZSRE]), {"target": "both"}, "'both' is not known"),
    ],
)
def test_what_cannot_be_imported(tmp_path: Path, text: str, options: dict[str, Any], said: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=said):
        import_facts(path, **options)


def test_a_fact_file_in_a_format_that_there_is_not_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text('facts:\n- "[Basel] lies on the river -> Elbe"\n', encoding="utf-8")
    with pytest.raises(BadInput, match="'conterfact' is not known"):
        import_facts(path, "conterfact")


def test_a_key_that_stands_twice_is_refused_since_nothing_says_which_is_meant(tmp_path: Path) -> None:
    twice = '{"case_id": 7, "target_new": "Elbe", "target_new": "Oder"}'
    (tmp_path / "data.json").write_text(f"[{json.dumps(EASYEDIT)}, {twice}]", encoding="utf-8")
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(EASYEDIT)}\n{twice}\n", encoding="utf-8")
    for name, place in (("data.json", "data.json"), ("data.jsonl", "data.jsonl:2")):
        with pytest.raises(BadInput, match="has a key twice") as caught:
            import_facts(tmp_path / name)
        assert caught.value.where == str(tmp_path / place)
        assert caught.value.details == ("'target_new' stands twice in the object that begins with 'case_id': 7",)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("data.jsonl", f'{json.dumps(EASYEDIT)}\n\n{{"prompt":}}\n', "data.jsonl:3:11"),
        ("data.json", '\n\n[\n{"prompt":}]', "data.json:4:11"),
    ],
)
def test_what_is_not_json_is_told_with_its_line(tmp_path: Path, name: str, text: str, place: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="not valid JSON") as caught:
        import_facts(tmp_path / name)
    assert caught.value.where == str(tmp_path / place)


def test_the_form_is_that_of_the_first_record_that_holds_something(tmp_path: Path) -> None:
    found = imported(tmp_path, {}, COUNTERFACT, EASYEDIT)
    assert (found.format, len(found.facts)) == ("counterfact", 1)
    assert found.rejected[1].endswith("'requested_rewrite' is missing, which a record of the form counterfact has")


def test_a_set_that_lacks_a_prompt_is_not_told_of_relations_in_fact_files(tmp_path: Path) -> None:
    found = imported(tmp_path, EASYEDIT, {**EASYEDIT, "prompt": None, "relation_id": "P6"})
    assert found.rejected == ("record 2 (case_id 7): 'prompt' is missing",)


@pytest.mark.parametrize("loc", ["where is the sea", ["where is the sea"]], ids=["text", "list"])
@pytest.mark.parametrize("answer", ["Portugal", ["Portugal", "Lusitania"]], ids=["one", "several"])
def test_the_neighbor_of_zsre_may_stand_in_a_list_and_have_several_names(
    tmp_path: Path, loc: object, answer: object
) -> None:
    (fact,) = imported(tmp_path, {**ZSRE, "loc": loc, "loc_ans": answer}).facts
    assert fact.neighbors == (Neighbor("where is the sea?", "Portugal"),)


@pytest.mark.parametrize("text", [json.dumps({"data": [EASYEDIT]}), json.dumps(EASYEDIT)])
def test_records_in_an_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    assert len(import_facts(path).facts) == 1


def test_records_in_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(EASYEDIT)}\n\n{json.dumps(EASYEDIT)}\n", encoding="utf-8")
    assert (import_facts(path).records, len(import_facts(path).facts)) == (2, 1)


def test_a_version_beside_the_records_and_an_object_around_them_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    for data in ({"version": 1, "records": [EASYEDIT]}, {"data": {"train": [EASYEDIT]}}):
        path.write_text(json.dumps(data), encoding="utf-8")
        assert len(import_facts(path).facts) == 1


def test_of_several_lists_of_records_none_is_guessed(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"train": [EASYEDIT], "test": [EASYEDIT]}), encoding="utf-8")
    with pytest.raises(BadInput, match="holds several lists of records: test, train"):
        import_facts(path)


def test_lines_under_the_name_of_json_are_told(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(f"{json.dumps(EASYEDIT)}\n{json.dumps(EASYEDIT)}\n", encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        import_facts(path)
    assert caught.value.hint == "where each line is a record of its own, call the file .jsonl"


def test_a_data_set_that_is_no_text_is_not_called_a_fact_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(BadInput, match="The data set has 1 error") as caught:
        import_facts(path)
    assert caught.value.hint == "docs/import.md describes the format"


@pytest.mark.parametrize("edits", [[], None])
def test_a_record_without_an_edit_is_named(tmp_path: Path, edits: object) -> None:
    found = imported(tmp_path, {"requested_rewrite": [COUNTERFACT["requested_rewrite"]]}, {"requested_rewrite": edits})
    assert found.rejected == ("record 2: holds no edit",)


UNIEDIT: dict[str, Any] = {"edit": {"prompt": "The inventor of G is", "target": "L", "subject": "G"}}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"locality": "x"}, "locality (text without a prompt and an answer)"),
        ({"generality": ["x", {"prompt": "Who made G?", "target": "L"}]}, "generality (text without a prompt and"),
        (
            {"generality": {"0": {"prompt": "Where lives G's inventor?", "target": "M"}}},
            "generality.* (another answer)",
        ),
        ({"generality": {"0": {"prompt": "Where lives G's inventor?"}}}, "generality.* (no answer)"),
    ],
)
def test_tests_that_are_passed_over_are_named(tmp_path: Path, more: dict[str, Any], named: str) -> None:
    found = imported(tmp_path, {**UNIEDIT, **more})
    (key,) = found.left_out
    assert key.startswith(named)
