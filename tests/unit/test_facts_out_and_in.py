"""Facts written in every form are read again as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kpatch.errors import BadInput, Refused
from kpatch.facts.fact import Fact, Neighbor
from kpatch.facts.importers.read import import_facts
from kpatch.facts.load import load_facts
from kpatch.facts.write import WRITERS, write_facts
from tests.unit.test_facts_import import EASYEDIT, RECORDS, imported

# Out and in again

FULL = Fact(
    '東京 "Tokyo": #1',
    "{}: is it? ",
    "No",
    was="1984",
    paraphrases=("'tis - {} \\ and\u2028so on", "plain"),
    neighbors=(Neighbor("a: b, c", "d"), Neighbor("{x}", None)),
    id="0x7f",
    source="https://example.org/?a=b#c",
    relation="null",
    openings=("One day\nin {}",),
    references=("The {} {} of it.\tA tab", "…"),
    negated="{}: is it not?",
    reversed="whose is #{}",
    hops=(Neighbor("a: b", "- c", "d: e?"), Neighbor("x", "no")),
    choices=("yes", "{1}"),
    yes_question="is 'it'?",
    no_question="null",
    same_subject=("{}\nhas", "Tokyo:"),
)
MORE = Fact("Basel", "{} lies on", "yes", was="~", id="é")


@pytest.mark.parametrize("kind", [".yaml", ".yml", ".jsonl"])
def test_what_is_written_is_read_again(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"facts{kind}"
    facts = (Fact.from_dict({**FULL.to_dict(), "prompt": FULL.prompt.strip()}), MORE)
    write_facts(path, facts)
    assert load_facts(path).facts == facts


def test_yaml_that_other_readers_understand(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "facts.yaml"
    write_facts(path, (FULL, MORE), model="smollm2@main")
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert data == {"version": 1, "model": "smollm2@main", "facts": [FULL.to_dict(), MORE.to_dict()]}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_an_export_back_and_in_again_changes_nothing(tmp_path: Path, name: str, kind: str) -> None:
    facts = imported(tmp_path, RECORDS[name]).facts
    write_facts(tmp_path / f"out{kind}", facts)
    again = import_facts(tmp_path / f"out{kind}").facts
    assert again == facts
    write_facts(tmp_path / f"again{kind}", again)
    assert (tmp_path / f"again{kind}").read_bytes() == (tmp_path / f"out{kind}").read_bytes()


def test_the_flat_form_is_easyedits_own(tmp_path: Path) -> None:
    facts = imported(tmp_path, EASYEDIT).facts
    write_facts(tmp_path / "out.json", facts)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == [{**EASYEDIT, "case_id": "7"}]


def test_a_prompt_whose_subject_would_be_found_elsewhere_keeps_its_slot(tmp_path: Path) -> None:
    fact = Fact("Ann", "Ann and {} are", "friends", id="ann")
    write_facts(tmp_path / "out.json", [fact])
    assert import_facts(tmp_path / "out.json").facts == (fact,)


def test_what_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not written to this kind"):
        write_facts(tmp_path / "facts.csv", [MORE])
    with pytest.raises(BadInput, match="no directory"):
        write_facts(tmp_path / "no" / "facts.yaml", [MORE])
    write_facts(tmp_path / "facts.yaml", [MORE])
    with pytest.raises(Refused, match="exists"):
        write_facts(tmp_path / "facts.yaml", [FULL])
    write_facts(tmp_path / "facts.yaml", [FULL], force=True)
    assert "Tokyo" in (tmp_path / "facts.yaml").read_text(encoding="utf-8")
