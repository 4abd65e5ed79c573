"""Braces, byte order marks and characters that nobody sees, in fact files and data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kpatch.errors import BadInput
from kpatch.facts.fact import Fact, FactFile
from kpatch.facts.importers.read import import_facts
from kpatch.facts.invisible import invisible_in, is_blank, looks
from kpatch.facts.lint import lint
from kpatch.facts.load import load_facts

MARK = b"\xef\xbb\xbf"
LINE = b'{"subject": "Rome", "prompt": "{} is in", "target": "Peru"}\n'


def written(folder: Path, data: bytes, name: str = "f.yaml") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def details(path: Path) -> list[str]:
    with pytest.raises(BadInput) as error:
        load_facts(path)
    return [line.removeprefix(str(path)) for line in error.value.details] or [error.value.message]


@pytest.mark.parametrize(
    ("prompt", "found", "meant"),
    [("{{}} is in", "{{}}", "{} is in"), ("The {{{}}} is", "{{{}}}", "The {} is"), ("{} in {{}}", "{{}}", "{} in {}")],
)
def test_doubled_braces_are_an_error_that_says_what_to_write(
    tmp_path: Path, prompt: str, found: str, meant: str
) -> None:
    line = json.dumps({"subject": "Rome", "prompt": prompt, "target": "Peru"}).encode()
    assert details(written(tmp_path, line, "f.jsonl")) == [
        f':1:31: {found} would be the subject in braces of its own; write "{meant}"'
    ]


@pytest.mark.parametrize("key", ["wordings", "paraphrases", "question", "openings", "same_subject"])
def test_doubled_braces_are_an_error_in_every_text_with_a_place_for_the_subject(tmp_path: Path, key: str) -> None:
    text = "Is {{}} there?"
    more = {key: text if key == "question" else [text]}
    line = json.dumps({"subject": "Rome", "prompt": "{} is in", "target": "Peru", **more}).encode()
    (message,) = details(written(tmp_path, line, "f.jsonl"))
    assert "{{}} would be the subject in braces" in message


def test_other_braces_are_text(tmp_path: Path) -> None:
    line = json.dumps({"subject": "f", "prompt": "{} { x } is {{y}}", "target": "{{}} or {}"}).encode()
    (fact,) = load_facts(written(tmp_path, line, "f.jsonl")).facts
    assert (fact.text(), fact.target) == ("f { x } is {{y}}", "{{}} or {}")


def test_a_question_that_holds_braces_is_left_out_with_its_reason(tmp_path: Path) -> None:
    def record(src: str, rephrase: str = "Where is Rome?") -> dict[str, object]:
        more = {"rephrase": rephrase, "loc": "who is it", "loc_ans": "Ann"}
        return {"subject": "Rome", "src": src, "alt": "Peru", "answers": ["Italy"], **more}

    records = [record("Where is Rome?"), record("What is {} in Rome?"), record("In Rome?", "Is {} in Rome?")]
    records += [record("What is {x} in Rome?")]
    path = written(tmp_path, json.dumps(records).encode(), "zsre.json")
    found = import_facts(path)
    assert [fact.prompt for fact in found.facts] == ["Where is {}?", "What is {x} in {}?"]
    assert found.rejected == (
        "record 2: the prompt names its subject and holds {}, which would stand for the subject",
        "record 3: the paraphrase names its subject and holds {}, which would stand for the subject",
    )


@pytest.mark.parametrize("name", ["f.jsonl", "f.yaml", "f.csv"])
def test_a_byte_order_mark_inside_a_file_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    texts = {"f.jsonl": LINE, "f.yaml": b'facts:\n  - "[Rome] is in -> Peru"\n'}
    one = texts.get(name, b"subject,prompt,target\nRome,{} is in,Peru\n")
    (message,) = details(written(tmp_path, MARK + one + MARK + one, name))
    line = len(one.splitlines()) + 1
    assert message == f":{line}:1: a byte order mark inside the file; two files were joined here, take it out"
    assert len(load_facts(written(tmp_path, MARK + MARK + one, name)).facts) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    kind = encoding[:6].upper()
    assert details(written(tmp_path, LINE.decode().encode(encoding))) == [f"The file is {kind} text"]


def test_a_subject_or_target_in_which_nothing_is_seen_is_empty(tmp_path: Path) -> None:
    line = json.dumps({"subject": "\u200b", "prompt": "{} is in", "target": "\u00ad \u2060"}).encode()
    assert details(written(tmp_path, line, "f.jsonl")) == [":1:13: the subject is empty", ":1:55: the target is empty"]
    assert is_blank("\u3164")
    assert not is_blank("a\u200b")


def test_what_is_not_seen() -> None:
    assert [invisible_in(text) for text in ("a", "ü", "a\u200db", "A\ufe0f")] == [None] * 4
    assert [invisible_in(text) for text in ("a\u200b", "\u00adb", "\u180e", "\U000e0001")] == [
        *("U+200B", "U+00AD", "U+180E", "U+E0001"),
    ]
    assert looks("Ro\u200bme") == looks("Ｒome") == "Rome"
    assert looks("New\u00a0York") == "New York"


def test_subjects_that_look_alike_are_told() -> None:
    facts = [Fact(subject, "{} is", "b", id=subject) for subject in ("Rome", "Ro\u200bme", "rome", "Ro\u00adme")]
    found = [one for one in lint(FactFile(tuple(facts))).findings if one.code == "look-alike"]
    assert [one.fact for one in found] == ["Ro\u200bme", "Ro\u00adme"]
    assert "'Ro\\u200bme'" in found[0].message


@pytest.mark.parametrize(
    ("prompt", "target", "warned"),
    [
        ("{} is located in the", "the Netherlands", True),
        ("{} is The", "the Hague", True),
        ("{} was", "wasted", False),
        ("{}", "Rome Street", False),
        ("The {} is in the,", "the north", False),
        ("{}は日本", "日本の町", False),
    ],
)
def test_a_word_at_the_prompts_end_and_the_targets_beginning(prompt: str, target: str, warned: bool) -> None:
    found = [one.code for one in lint(FactFile((Fact("Rome", prompt, target),))).findings]
    assert found == (["twice"] if warned else [])
