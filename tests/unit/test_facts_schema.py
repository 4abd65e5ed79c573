"""The JSON Schema that is shipped: the same keys as the code, the same verdict on files, and our example is right."""

from __future__ import annotations

import csv
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from kpatch.errors import KpatchError
from kpatch.facts import fact
from kpatch.facts.lint import lint
from kpatch.facts.load import load_facts

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads(resources.files("kpatch.facts").joinpath("facts.schema.json").read_text(encoding="utf-8"))
CHECK = jsonschema.Draft202012Validator(SCHEMA)
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        (SCHEMA, fact.FILE_KEYS),
        (SCHEMA["$defs"]["relation"], fact.RELATION_KEYS),
        (SCHEMA["$defs"]["fact"], fact.FACT_KEYS),
        (SCHEMA["$defs"]["neighbor"], fact.NEIGHBOR_KEYS),
        (SCHEMA["$defs"]["protected"], fact.PROTECT_KEYS),
    ],
)
def test_schema_and_code_have_the_same_keys(part: dict[str, Any], keys: tuple[str, ...]) -> None:
    assert set(part["properties"]) == set(keys)
    assert part["additionalProperties"] is False


def test_a_fact_has_the_same_keys_as_its_class() -> None:
    fields = set(fact.Fact.__dataclass_fields__) - {"where", "further"}  # kpatch's own
    assert fields == set(fact.FACT_KEYS)
    assert set(fact.Neighbor.__dataclass_fields__) == set(fact.NEIGHBOR_KEYS)


GOOD = [
    "{facts: ['[A] is -> b']}",
    "{version: 1, model: m, relations: {r: {prompt: '{} is', paraphrases: ['is {}']}},"
    " facts: [{subject: A, relation: r, target: b}]}",
    "{facts: [{subject: 1984, prompt: '{} is', target: No, was: , id: 7, source: x, paraphrases: [a, '{} b'],"
    " neighbors: [a, 'b -> c', {prompt: d}, {prompt: e, target: f}]}]}",
    "{relations: {r: {prompt: '{} is', question: 'Who is {}?'}, s: {prompt: '{} has', question: }},"
    " facts: [{subject: A, relation: r, target: b, question: 'Is A b?',"
    " neighbors: [{prompt: c, question: 'Is c d?'}]}]}",
    "{relations: {r: {prompt: '{} is', negated: '{} is not', reversed: 'Who is {}?', same_subject: ['{} has']},"
    " s: {prompt: '{} has', negated: , reversed: , same_subject: }},"
    " facts: [{subject: A, relation: r, target: b, hops: ['c -> d', {prompt: e, target: 1}], choices: [c, No],"
    " yes_question: 'Is A b?', no_question: 'Is A c?', negated: A is not, reversed: 'Who is b?',"
    " same_subject: [A has], question: }]}",
    "{facts: [{subject: A, prompt: '{x} {} {y', target: b, paraphrases: , neighbors: }], relations: }",
]
BAD = [
    "{}",
    "[]",
    "{facts: []}",
    "{facts: [], more: 1}",
    "{facts: ['A is -> b']}",
    "{facts: ['[A] is']}",
    "{facts: [[A]]}",
    "{version: 2, facts: ['[A] is -> b']}",
    "{facts: [{subject: A, target: b}]}",
    "{facts: [{subject: '', prompt: '{} is', target: b}]}",
    "{facts: [{subject: A, prompt: '{} is', target: ' '}]}",
    "{facts: [{subject: A, prompt: 'A is', target: b}]}",
    "{facts: [{subject: A, prompt: '{} is {}', target: b}]}",
    "{facts: [{subject: A, prompt: '{} is', target: [b]}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, extra: c}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, paraphrases: c}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, paraphrases: ['{} {}']}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, neighbors: ['{} c']}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, neighbors: [{target: c}]}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, neighbors: [{prompt: c, more: d}]}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, question: 'Is {} {}?'}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, neighbors: [{prompt: c, question: 'Who is {}?'}]}]}",
    "{relations: {r: {prompt: '{} is', question: 'Who is it?'}}, facts: ['[A] is -> b']}",
    "{facts: [{subject: A, prompt: '{} is', target: b, hops: [c]}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, hops: [{prompt: c}]}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, hops: ['{} c -> d']}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, choices: c}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, choices: [' ']}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, negated: '{} {}'}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, reversed: '{} {}'}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, same_subject: ['{} {}']}]}",
    "{facts: [{subject: A, prompt: '{} is', target: b, yes_question: [c]}]}",
    "{relations: {r: {prompt: '{} is', negated: is not}}, facts: ['[A] is -> b']}",
    "{relations: {r: {prompt: '{} is', reversed: 'Who is it?'}}, facts: ['[A] is -> b']}",
    "{relations: {r: {prompt: '{} is', same_subject: [it has]}}, facts: ['[A] is -> b']}",
    "{relations: {r: {paraphrases: []}}, facts: ['[A] is -> b']}",
    "{relations: {r: {prompt: '{} is', paraphrases: [b]}}, facts: ['[A] is -> b']}",
]


@pytest.mark.parametrize(("text", "good"), [(text, True) for text in GOOD] + [(text, False) for text in BAD])
def test_schema_and_loader_agree(tmp_path: Path, text: str, good: bool) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    try:
        load_facts(path)
        loads = True
    except KpatchError:
        loads = False
    assert loads == good
    # As an editor's YAML reads it: with numbers, truth values and nothings
    assert CHECK.is_valid(yaml.safe_load(text)) == good


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.name))
def test_every_example_fits_the_schema(path: Path) -> None:
    CHECK.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_news_are_complete() -> None:
    file = load_facts(ROOT / "examples" / "news.yaml")
    assert file.model == "smollm2"
    assert len(file.facts) == 12
    assert len({fact.subject for fact in file.facts}) == 12
    assert sum(fact.relation is not None for fact in file.facts) >= 2
    for one in file.facts:
        assert one.was
        assert len(one.paraphrases) == 2
        assert len(one.neighbors) == 2
        assert all(neighbor.target for neighbor in one.neighbors)
    assert lint(file).findings == ()


def _examples(kind: str) -> list[str]:
    text = (ROOT / "docs" / "facts.md").read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def test_the_examples_in_the_documentation_load(tmp_path: Path) -> None:
    counts = []
    for kind, ending in (("yaml", "yaml"), ("json", "jsonl"), ("csv", "csv")):
        for text in _examples(kind):
            path = tmp_path / f"f.{ending}"
            path.write_text(text, encoding="utf-8")
            counts.append(len(load_facts(path).facts))
            if kind == "csv":
                assert set(next(csv.reader(text.splitlines()))) <= set(fact.FACT_KEYS)
    assert len(counts) >= 3
    assert all(counts)


def test_the_documentation_tells_real_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file with errors in docs/facts.md gives exactly the messages that stand below it."""
    wrong, told = re.findall(
        r"```yaml-with-errors\n(.*?)```.*?```text\n(.*?)```",
        (ROOT / "docs" / "facts.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )[0]
    monkeypatch.chdir(tmp_path)
    Path("facts.yaml").write_text(wrong, encoding="utf-8")
    with pytest.raises(KpatchError) as caught:
        load_facts("facts.yaml")
    assert list(caught.value.details) == [line for line in told.splitlines() if line.startswith("facts.yaml:")]


def test_keys_that_begin_with_x_hold_anchors(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(
        "x-shared:\n  near: &near [{prompt: The Louvre is in, target: Paris}]\n"
        'facts:\n  - {subject: Eiffel Tower, prompt: "{} is in", target: Rome, neighbors: *near}\n'
    )
    [fact] = load_facts(path).facts
    assert [neighbor.target for neighbor in fact.neighbors] == ["Paris"]
    path.write_text('facts:\n  - {subject: Eiffel Tower, prompt: "{} is in", target: Rome, x-note: mine}\n')
    with pytest.raises(KpatchError) as refused:
        load_facts(path)
    assert "unknown key 'x-note'" in str(refused.value.details)
