"""Data sets beyond CounterFact: every part in its place, and every key that is left out reported."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from kpatch.errors import BadInput
from kpatch.facts.fact import Neighbor
from kpatch.facts.importers.read import import_facts
from kpatch.facts.importers.record import shared_text
from tests.unit.test_facts_import import (
    AKEW,
    CKNOW,
    COUNTERFACT,
    EASYEDIT,
    HALLU,
    KNOWEDIT,
    KNOWN,
    MQUAKE,
    RAW_RIPPLE,
    RIPPLE,
    UNIEDIT,
    WIKIBIG,
    ZSRE,
    imported,
)

_IDS = {"requested_rewrite.target_new.id", "requested_rewrite.target_true.id"}
LEFT_OUT: list[tuple[Any, set[str]]] = [
    (COUNTERFACT, {"attribute_prompts", "pararel_idx", *_IDS}),
    (EASYEDIT, set()),
    (ZSRE, {"pred", "cond"}),
    (KNOWN, {"template", "prediction"}),
    (KNOWEDIT, {"portability.Reasoning"}),
    (MQUAKE, {"questions", "new_answer", *_IDS}),
    (AKEW, {"requested_rewrite.prompt_full", "requested_rewrite.unsfact_triplets_GPT", *_IDS}),
    (WIKIBIG, {"tag"}),
    (HALLU, {"topic", "eval_some_model", "multiple_choice_labels"}),
    (RIPPLE, {"Compositionality_I", "Subject_Aliasing (another answer)"}),
    (UNIEDIT, {"edit.path_type", "generality.*.one_hops", "generality.* (another answer)"}),
    (CKNOW, {"portability"}),
]


@pytest.mark.parametrize(("record", "keys"), LEFT_OUT)
def test_the_keys_that_are_left_out_are_named(tmp_path: Path, record: Any, keys: set[str]) -> None:
    found = imported(tmp_path, record, {**record, "other": "x", "none": None, "empty": []})
    assert found.left_out == {**dict.fromkeys(keys, 2), "other": 1}


def test_a_record_that_breaks_a_rule_leaves_out_everything(tmp_path: Path) -> None:
    found = imported(tmp_path, ZSRE, {**ZSRE, "src": "Where?", "more": "x"})
    assert found.left_out == {"pred": 1, "cond": 1}
    assert len(found.rejected) == 1


def test_ripple_in_the_flat_shape(tmp_path: Path) -> None:
    (fact,) = imported(tmp_path, RIPPLE).facts
    assert (fact.subject, fact.prompt, fact.target) == ("Basel", "The river of {} is", "Elbe")
    assert fact.paraphrases == ("The river of Basle is",)
    assert fact.neighbors == (
        Neighbor("The country of Basel is", "Switzerland"),
        Neighbor("The bridges of Basel are", "five"),
    )


def test_ripple_as_published(tmp_path: Path) -> None:
    found = imported(tmp_path, RAW_RIPPLE)
    (fact,) = found.facts
    assert (found.format, fact.relation) == ("ripple", "RIVER")
    assert (fact.subject, fact.prompt) == ("Basel am Rhein", "The river which flows through {} is")
    assert (fact.target, fact.was) == ("the Elbe", "the Rhine")
    assert fact.paraphrases == ("The river of Basle is",)
    assert fact.neighbors == (Neighbor("The country of Basel am Rhein is", "Switzerland"),)
    assert {"Logical_Generalization", "edit.target_id", "Relation_Specifity.test_queries.answers.aliases"} <= set(
        found.left_out
    )


@pytest.mark.parametrize(
    ("sentence", "subject", "prompt", "target"),
    [
        ("The name of the mother of Ann Berg is Eva.", "Ann Berg", "The name of the mother of {} is", "Eva"),
        ("The names of the sons of Ann are Tom and Jim.", "Ann", "The names of the sons of {} are", "Tom and Jim"),
        ("The office held by Ann Berg is mayor", "Ann Berg", "The office held by {} is", "mayor"),
    ],
)
def test_a_ripple_sentence_by_itself(tmp_path: Path, sentence: str, subject: str, prompt: str, target: str) -> None:
    record = {"edit": {"prompt": sentence, "subject_id": "Q1"}, "Forgetfulness": []}
    (fact,) = imported(tmp_path, record).facts
    assert (fact.subject, fact.prompt, fact.target) == (subject, prompt, target)


@pytest.mark.parametrize("sentence", ["Ann lives in Rome.", "Ann is a singer."])
def test_a_ripple_sentence_that_cannot_be_split(tmp_path: Path, sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        imported(tmp_path, {"edit": {"prompt": sentence}, "Forgetfulness": []})
    assert "write 'subject', 'prompt' and 'target_new'" in caught.value.details[1]


def test_akew_of_both_kinds(tmp_path: Path) -> None:
    (fact,) = imported(tmp_path, AKEW).facts
    assert fact.paraphrases == ("On which river does Basel lie?", "Ships to Basel go up the")
    assert fact.references == ("Basel is a town whose bridges span the Elbe.",)
    (other,) = imported(tmp_path, {**AKEW, "requested_rewrite": [AKEW["requested_rewrite"]]}).facts
    assert (other.id, other.references) == ("7-0", fact.references)


def test_wikibigedit(tmp_path: Path) -> None:
    new = {"tag": "new", "subject": "Ulm", "update": "Where is Ulm?", "ans": "x", "loc": None}
    fact, bare = imported(tmp_path, WIKIBIG, new).facts
    assert (fact.prompt, fact.target) == ("Which river flows through {}?", "Elbe")
    assert len(fact.paraphrases) == 2
    assert fact.neighbors == (Neighbor("Which river flows through Ulm?", "Danube"),)
    assert (bare.paraphrases, bare.neighbors) == ((), ())


def test_hallueditbench_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "hallu.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(HALLU))
        writer.writeheader()
        writer.writerow({**HALLU, "topic": 'a "quoted", and\nbroken text'})
    found = import_facts(path)
    (fact,) = found.facts
    assert found.format == "hallu"
    assert (fact.prompt, fact.target, fact.was) == ("Which river flows through {}?", "Rhine", "Elbe")
    assert fact.paraphrases == ("What river is Basel on?",)
    assert fact.neighbors == (Neighbor("Which river flows through Ulm?"),)
    assert (fact.reversed, fact.choices) == ("Which town lies on the Rhine?", ("Inn",))
    assert fact.yes_question == "Does the Rhine flow through Basel?"
    assert fact.no_question == "Does the Elbe flow through Basel?"
    assert fact.hops == (Neighbor("Into which sea does the river of Basel flow?", "North Sea"),)
    assert import_facts(path, "hallu") == found


@pytest.mark.parametrize("choices", ["Rhine, Inn", "['Rhine'", "{'Rhine': 1}"])
def test_choices_that_are_no_list_are_told(tmp_path: Path, choices: str) -> None:
    found = imported(tmp_path, HALLU, {**HALLU, "subject": "Ulm", "multiple_choices": choices})
    assert len(found.facts) == 1
    assert "expected a list of choices" in found.rejected[0]


def test_a_table_of_facts_is_still_one(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("subject,prompt,target\nBasel,{} is on the,Elbe\n")
    assert import_facts(path).format == import_facts(path, "facts").format == "facts"
    path.write_text("subject;prompt;target\n")
    with pytest.raises(BadInput) as caught:
        import_facts(path)
    assert "separated by ';'" in caught.value.details[0]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="no form that is known"):
        import_facts(path)


@pytest.mark.parametrize("numbered", [True, False])
def test_uniedit(tmp_path: Path, numbered: bool) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"0": UNIEDIT, "1": UNIEDIT} if numbered else [UNIEDIT, UNIEDIT]))
    found = import_facts(path)
    assert (found.format, found.records, len(found.repeats)) == ("uniedit", 2, 1)
    (fact,) = found.facts
    assert (fact.subject, fact.target) == ("Basel", "Elbe")
    assert fact.paraphrases == ("Which river flows through Basel?",)
    assert fact.neighbors == (Neighbor("The river of Ulm is", "Danube"),)


def test_cknowedit_finds_its_subject(tmp_path: Path) -> None:
    (fact,) = imported(tmp_path, CKNOW).facts
    assert (fact.subject, fact.prompt, fact.target, fact.was) == ("《江河志》", "{}的作者是", "李二", "王一")
    assert fact.neighbors == (Neighbor("《江河志》成书于", "汉代"),)
    named = {**CKNOW, "subject": "江河志", "rephrase": ["谁写的？"]}
    assert imported(tmp_path, named).facts[0].prompt == "《{}》的作者是"
    with pytest.raises(BadInput) as caught:
        imported(tmp_path, {**CKNOW, "rephrase": ["谁写的？"]})
    assert "add a 'subject' key" in caught.value.details[1]


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        (["The depth of Lake Verla is", "Where is Lake Verla?"], "Lake Verla"),
        (["The name of the mother of The Band is", "The age of The Band is"], "The Band"),
        (["What is X-12?", "X-12 is what?"], "X-12"),
        (["a b", "c d"], ""),
        (["“江河”的意思是", "请问“江河”的意思？"], "“江河”"),
        (["Lakeside is", "Lake is"], ""),
        ([], ""),
    ],
)
def test_what_texts_share(texts: list[str], shared: str) -> None:
    assert shared_text(texts) == shared
