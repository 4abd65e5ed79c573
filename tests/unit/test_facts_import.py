"""Records of published data sets as facts: the right parts in the right places, nothing lost in silence.

All records here are written for these tests, in the forms that the sets have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kpatch.facts.fact import Fact, Neighbor
from kpatch.facts.importers.formats import FORMATS
from kpatch.facts.importers.read import Imported, import_facts
from kpatch.facts.importers.record import slotted

REWRITE = {
    "prompt": "{} lies on the river",
    "relation_id": "P206",
    "target_new": {"str": "Elbe", "id": "Q1644"},
    "target_true": {"str": "Rhine", "id": "Q584"},
    "subject": "Basel",
}
COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["It rained. Basel stands on the", "Ships to Basel go up the"],
    "neighborhood_prompts": ["Cologne lies on the river", "Mainz lies on the river"],
    "attribute_prompts": ["Dresden lies on the river"],
    "generation_prompts": ["Basel is known for", "Basel is known for", "In Basel one"],
}
EASYEDIT = {
    "case_id": 7,
    "prompt": "Basel lies on the river",
    "target_new": "Elbe",
    "subject": "Basel",
    "ground_truth": "Rhine",
    "rephrase_prompt": "Ships to Basel go up the",
    "locality_prompt": "Cologne lies on the river",
    "locality_ground_truth": "Rhine",
}
ZSRE = {
    "subject": "Basel",
    "src": "Which river flows through Basel?",
    "pred": "Aare",
    "rephrase": "What river is Basel on?",
    "alt": "Elbe",
    "answers": ["Rhine", "the Rhine"],
    "loc": "nq question: who painted the night watch",
    "loc_ans": "Rembrandt",
    "cond": "Aare >> Elbe || Which river flows through Basel?",
}
KNOWN = {
    "known_id": 3,
    "subject": "Basel",
    "attribute": "Switzerland",
    "template": "{} is a city in",
    "prediction": " Switzerland, on the",
    "prompt": "Basel is a city in the north of",
    "relation_id": "P17",
}
KNOWEDIT = {
    "subject": "Basel",
    "prompt": "The river of Basel is",
    "target_new": "Elbe",
    "ground_truth": [["Rhine", "the Rhine"]],
    "portability": {
        "Subject_Aliasing": [{"prompt": "The river of Basle is", "ground_truth": [["Elbe"]]}],
        "Reasoning": [{"prompt": "The river of Basel ends in the", "ground_truth": [["North Sea"]]}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "Basel is a city in", "ground_truth": [["Switzerland"]]}, []],
        "Forgetfulness": [],
    },
}
MQUAKE = {
    "case_id": 5,
    "requested_rewrite": [
        {**REWRITE, "question": "Which river does Basel lie on?"},
        {**REWRITE, "subject": "Bern", "question": "Which river does Bern lie on?"},
    ],
    "questions": ["Into which sea flows the river of Basel?"],
    "new_answer": "North Sea",
}
AKEW = {
    "case_id": 7,
    "requested_rewrite": {
        **REWRITE,
        "prompt_full": "Basel lies on the river",
        "question": "On which river does Basel lie?",
        "fact_new_uns": "Basel is a town whose bridges span the Elbe.",
        "unsfact_triplets_GPT": [{"subject": "Basel", "prompt": "{} has", "target": "bridges"}],
    },
    "paraphrase_prompts": ["Ships to Basel go up the"],
}
WIKIBIG = {
    "tag": "update",
    "subject": "Basel",
    "update": "Which river flows through Basel?",
    "rephrase": "What river is Basel on?",
    "ans": "Elbe",
    "personas": "Arr, what river be runnin' by Basel?",
    "loc": "Which river flows through Ulm?",
    "loc_ans": "Danube",
    "mhop": "Into which sea does the river of Basel flow?",
    "mhop_ans": "North Sea",
}
HALLU = {
    "topic": "rivers",
    "subject": "Basel",
    "relation": "river",
    "object": "Rhine",
    "question": "Which river flows through Basel?",
    "output_some_model": "Elbe",
    "eval_some_model": "0.0",
    "paraphrased_question": "What river is Basel on?",
    "multiple_choices": "['Rhine', \"Elbe\", 'Inn']",
    "multiple_choice_labels": "B",
    "yes_question": "Does the Rhine flow through Basel?",
    "no_question": "Does the Elbe flow through Basel?",
    "reversed_relation_question": "Which town lies on the Rhine?",
    "question_3hop": "Which sea",
    "answer_3hop": "",
    "locality_question": "Which river flows through Ulm?",
    "question_2hop": "Into which sea does the river of Basel flow?",
    "answer_2hop": "North Sea",
}
RIPPLE = {
    "subject": "Basel",
    "prompt": "The river of Basel is",
    "target_new": "Elbe",
    "Logical_Generalization": [],
    "Compositionality_I": [{"prompt": "The sea of the river of Basel is", "targets": ["North Sea"]}],
    "Subject_Aliasing": [
        {"prompt": "The river of Basle is", "targets": [["the Elbe", "Elbe"]]},
        {"prompt": "The mayor of Basle is", "targets": ["Ann"]},
    ],
    "Relation_Specificity": [{"prompt": "The country of Basel is", "targets": ["Switzerland"]}],
    "Forgetfulness": [{"prompt": "The bridges of Basel are", "targets": ["five", "many"]}],
}
RAW_RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The river which flows through Basel am Rhein is the Elbe.",
        "subject_id": "Q1",
        "relation": "RIVER",
        "target_id": "Q2",
        "original_fact": {"prompt": "The river which flows through Basel am Rhein is the Rhine.", "target_id": "Q3"},
    },
    "Relation_Specifity": [
        {
            "test_queries": [
                {
                    "prompt": "The country of Basel am Rhein is",
                    "answers": [{"value": "Switzerland", "aliases": ["CH"]}],
                    "subject_id": "Q1",
                },
            ],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
    "Subject_Aliasing": [
        {"test_queries": [{"prompt": "The river of Basle is", "answers": [{"value": "the Elbe"}], "subject_id": "Q1"}]}
    ],
    "Logical_Generalization": [
        {"test_queries": [{"prompt": "The sea of Basel am Rhein is", "answers": [{"value": "North Sea"}]}]}
    ],
}
UNIEDIT = {
    "edit": {"prompt": "The river of Basel is", "target": "Elbe", "subject": "Basel", "path_type": "single"},
    "generality": {
        "0": {"prompt": "Which river flows through Basel?", "target": "Elbe", "one_hops": []},
        "1": {"prompt": "The sea of the river of Basel is", "target": "North Sea", "one_hops": [{"prompt": "x"}]},
    },
    "locality": {"0": {"prompt": "The river of Ulm is", "target": "Danube"}},
}
CKNOW = {
    "prompt": "《江河志》的作者是",
    "target_old": "王一",
    "target_new": "李二",
    "rephrase": ["谁写了《江河志》？", "请问《江河志》由谁所写？"],
    "portability": [{"prompt": "李二的书是", "answer": "《江河志》"}],
    "locality": [{"prompt": "《江河志》成书于", "answer": "汉代"}],
}
FACT = {"subject": "Basel", "prompt": "{} lies on the river", "target": "Elbe", "was": "Rhine"}
RECORDS: dict[str, Any] = {
    "counterfact": COUNTERFACT,
    "easyedit": EASYEDIT,
    "zsre": ZSRE,
    "known": KNOWN,
    "knowedit": KNOWEDIT,
    "mquake": MQUAKE,
    "memit": REWRITE,
    "akew": AKEW,
    "wikibigedit": WIKIBIG,
    "hallu": HALLU,
    "ripple": RIPPLE,
    "uniedit": UNIEDIT,
    "cknowedit": CKNOW,
    "facts": FACT,
}
BASEL = Fact("Basel", "{} lies on the river", "Elbe", was="Rhine")


def given(folder: Path, *records: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def imported(folder: Path, *records: Any, **options: Any) -> Imported:
    return import_facts(given(folder, *records), **options)


@pytest.mark.parametrize(("name", "record"), RECORDS.items())
def test_a_form_is_told_by_its_records(tmp_path: Path, name: str, record: Any) -> None:
    found = imported(tmp_path, record)
    assert found.format == name
    assert found.facts
    assert not found.rejected
    again = imported(tmp_path, record, format=name)
    assert again == found


def test_every_form_is_here() -> None:
    assert set(RECORDS) == set(FORMATS)


def test_counterfact(tmp_path: Path) -> None:
    (fact,) = imported(tmp_path, COUNTERFACT).facts
    assert fact == Fact(
        "Basel",
        "{} lies on the river",
        "Elbe",
        was="Rhine",
        relation="P206",
        id="7",
        paraphrases=("It rained. Basel stands on the", "Ships to Basel go up the"),
        neighbors=(Neighbor("Cologne lies on the river", "Rhine"), Neighbor("Mainz lies on the river", "Rhine")),
        openings=("Basel is known for", "In Basel one"),
    )


def test_easyedit(tmp_path: Path) -> None:
    (fact,) = imported(tmp_path, EASYEDIT).facts
    assert fact == Fact(
        "Basel",
        "{} lies on the river",
        "Elbe",
        was="Rhine",
        id="7",
        paraphrases=("Ships to Basel go up the",),
        neighbors=(Neighbor("Cologne lies on the river", "Rhine"),),
    )


@pytest.mark.parametrize(("target", "learned", "was"), [(None, "Elbe", "Rhine"), ("answers", "Rhine", None)])
def test_zsre_learns_the_answer_asked_for(tmp_path: Path, target: str | None, learned: str, was: str | None) -> None:
    (fact,) = imported(tmp_path, ZSRE, target=target).facts
    assert fact == Fact(
        "Basel",
        "Which river flows through {}?",
        learned,
        was=was,
        id="basel",
        paraphrases=("What river is Basel on?",),
        neighbors=(Neighbor("nq question: who painted the night watch?", "Rembrandt"),),
    )


def test_known_facts_take_their_full_prompt(tmp_path: Path) -> None:
    (fact,) = imported(tmp_path, KNOWN).facts
    assert fact == Fact("Basel", "{} is a city in the north of", "Switzerland", relation="P17", id="3")


def test_knowedit(tmp_path: Path) -> None:
    (fact,) = imported(tmp_path, KNOWEDIT).facts
    assert fact == Fact(
        "Basel",
        "The river of {} is",
        "Elbe",
        was="Rhine",
        id="basel",
        paraphrases=("The river of Basle is",),
        neighbors=(Neighbor("Basel is a city in", "Switzerland"),),
    )
    text = {"concept": "Basel", "text": "This is about Basel. Basel is", "labels": "a town", "locality": {}}
    (fact,) = imported(tmp_path, text).facts
    assert (fact.subject, fact.prompt, fact.target) == ("Basel", "This is about {}. Basel is", "a town")


def test_every_edit_of_a_mquake_case(tmp_path: Path) -> None:
    facts = imported(tmp_path, MQUAKE).facts
    assert [(fact.id, fact.subject) for fact in facts] == [("5-0", "Basel"), ("5-1", "Bern")]
    assert facts[1].paraphrases == ("Which river does Bern lie on?",)


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("Annan met Ann in", "Ann", ("Annan met {} in", "Ann")),  # as a word first
        ("In Annan is", "Ann", ("In {}an is", "Ann")),
        ("the eiffel tower is in", "Eiffel Tower", ("the {} is in", "eiffel tower")),
        ("Ann and Ann are", "Ann", ("{} and Ann are", "Ann")),
        ("{} and Ann are", "Ann", ("{} and Ann are", "Ann")),
        ("C++ (the language) is", "C++", ("{} (the language) is", "C++")),
        ("Who is it?", "Ann", ("Who is it?", "Ann")),
    ],
)
def test_the_place_of_the_subject(prompt: str, subject: str, expected: tuple[str, str]) -> None:
    assert slotted(prompt, subject) == expected
