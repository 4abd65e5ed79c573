"""Fact files that are wrong: every error at once, each with its place and the right exit code."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from kpatch.errors import BadInput, Refused
from kpatch.facts import load as loading
from kpatch.facts import yaml_tree
from kpatch.facts.fact import Fact
from kpatch.facts.load import load_facts
from kpatch.facts.problems import limited


def errors(folder: Path, text: str | bytes, name: str = "f.yaml") -> list[str]:
    """The error lines of a file, without the folder's name."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput) as caught:
        load_facts(path)
    assert caught.value.exit_code == 2
    assert caught.value.where == str(path)
    return [line.removeprefix(f"{folder}/") for line in caught.value.details]


def one(folder: Path, text: str | bytes, name: str = "f.yaml") -> str:
    found = errors(folder, text, name)
    assert len(found) == 1, found
    return found[0]


MANY = """\
version: 2
modle: smollm2
relations:
  capital: {prompt: "The capital of {} is", paraphrases: ["its capital city is"]}
  half: {}
facts:
  - subject: Eiffel Tower
    prompt: "The Eiffel Tower is located in the city of"
    targt: Rome
    neighbors: [{prompt: "{} is", traget: x}, "a -> b -> c", 7]
  - {subject: Australia, relation: captal, target: Sydney, target: X}
  - "Eiffel Tower was designed by -> Le Corbusier"
  - {subject: "", prompt: "{} and {}", target: " "}
  - subject: 東京
    prompt: "Bar {subject} is"
    target:
    paraphrases: hello
  - subject: Zed
    prompt: The bar is in
    target: {}
    was: "a\\x1bb"
  - [a, b]
"""


def test_all_errors_come_at_once_with_their_places(tmp_path: Path) -> None:
    assert errors(tmp_path, MANY) == [
        "f.yaml:1:10: this kpatch reads version 1, found '2'",
        "f.yaml:2:1: unknown key 'modle'; did you mean 'model'?",
        "f.yaml:4:59: a relation's paraphrase needs {} where each fact's subject goes",
        "f.yaml:5:9: 'prompt' is missing",
        "f.yaml:7:5: 'target' is missing",
        'f.yaml:8:13: the prompt has no {}; write "The {} is located in the city of"',
        "f.yaml:9:5: unknown key 'targt'; did you mean 'target'?",
        "f.yaml:10:17: a neighbor is about another subject: write it out instead of {}",
        "f.yaml:10:35: unknown key 'traget'; did you mean 'target'?",
        "f.yaml:10:47: expected one '->' between prompt and target, found 2",
        "f.yaml:11:36: the file defines no relation 'captal'; did you mean 'capital'?",
        "f.yaml:11:60: the key 'target' stands here a second time",
        "f.yaml:12:5: the short form needs exactly one subject in [brackets]; found none",
        "f.yaml:13:15: the subject is empty",
        "f.yaml:13:27: the prompt has 2 {}; exactly one may stand for the subject",
        "f.yaml:13:48: the target is empty",
        'f.yaml:15:13: the prompt has no {}; write "Bar {} is"',
        "f.yaml:16:12: the target is empty",
        "f.yaml:17:18: expected a list, found text; a list stands in [ ]",
        "f.yaml:19:13: the prompt has no {} and does not contain the subject 'Zed'; write {} where the subject goes",
        "f.yaml:20:13: expected text, found an empty mapping {}; put the text in quotes",
        "f.yaml:21:10: the text holds the control character U+001B",
        "f.yaml:22:5: expected a fact (a mapping, or the short form in quotes), found a list",
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{subject: A, prompt: "{} is", target: B, question: "Is {} {}?"}', "the question must name its subject once"),
        ('{subject: "{}", prompt: "{} is", target: B}', "the subject holds {}"),
    ],
)
def test_a_slot_that_nothing_fills_is_an_error(tmp_path: Path, entry: str, message: str) -> None:
    assert message in one(tmp_path, f"facts:\n- {entry}\n")


def test_a_wording_that_another_fact_contradicts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(
        'facts:\n- {subject: A, prompt: "{} is in", target: B, wordings: ["{} lies in"]}\n- "[A] lies in -> C"\n',
        encoding="utf-8",
    )
    with pytest.raises(Refused, match="contradict") as caught:
        load_facts(path)
    assert "for the same wording" in caught.value.details[0]


def test_json_lines_errors_have_columns(tmp_path: Path) -> None:
    text = """\
{"subject": "Zürich", "prompt": "Zürich is in", "target": 1984, "neighbors": [{"prompt": "x", "tagret": "y"}]}

{"subject": "a", "subject": "b"}
{bad}
  {"subject": "\\ud83d\\ude00", "prompt": "{} is", "target": null}
[1]
"Paris is -> x"
{"subject": "a\\ud800", "prompt": "{} is", "target": "b"}
{"subject": "a", "relation": "capital", "target": "b"}
"""
    assert errors(tmp_path, text + "[" * 100_000, "f.jsonl") == [
        'f.jsonl:1:33: the prompt has no {}; write "{} is in"',
        "f.jsonl:1:95: unknown key 'tagret'; did you mean 'target'?",
        "f.jsonl:3:18: the key 'subject' stands here a second time",
        "f.jsonl:4:2: this is not valid JSON (Expecting property name enclosed in double quotes); one object a line",
        "f.jsonl:5:60: the target is empty",
        "f.jsonl:6:1: expected a fact (a mapping, or the short form in quotes), found a list",
        "f.jsonl:7:1: the short form needs exactly one subject in [brackets]; found none",
        "f.jsonl:8:1: the text holds the control character U+D800",
        "f.jsonl:9:30: no prompt is given, and the file defines no relation 'capital' to take one from",
        "f.jsonl:10:1: nested too deeply for a fact",
    ]


def test_csv_errors_have_columns(tmp_path: Path) -> None:
    text = """\
subject,prompt,target,paraphrases,neighbors
Eiffel,"{} is, in",Rome,"{} at | b {} {}","The Louvre is in -> Paris | x -> y -> z"

"Two
lines",foo,,,
a,{},b,c,d,e
"""
    assert errors(tmp_path, text, "f.csv") == [
        "f.csv:2:25: this text has 2 {}; at most one may stand for the subject",
        "f.csv:2:43: expected one '->' between prompt and target, found 2",
        "f.csv:5:8: the prompt has no {} and does not contain the subject 'Two\\nlines'; "
        "write {} where the subject goes",
        "f.csv:5:12: the target is empty",
        "f.csv:6:12: the row has 6 cells, the header 5; a cell with a comma needs quotes",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a;b\n1;2\n", "1:1: the columns are separated by ';'; a fact file's are by ','"),
        ("subject,prompt\na,{}\n", "1:1: the column 'target' is missing"),
        ("subject,promt,target\n", "1:1: unknown column 'promt'; did you mean 'prompt'?"),
        ("subject,prompt,target,subject\n", "1:1: the column 'subject' stands here twice"),
        (
            'subject,prompt,target\na,{} is,b\n"c,{} is,d\ne,{} is,f\n',
            "3:1: this row is not valid CSV (unexpected end of data); "
            "quotes are closed, and those inside a quoted cell doubled",
        ),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    assert one(tmp_path, text, "f.csv") == f"f.csv:{message}"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("facts:\n  - subject: A\n    prompt: {} is in\n    target: B\n", "3:16", 'needs quotes: "{} is ..."'),
        ("facts:\n  - {subject: A, prompt: {} is in, target: B}\n", "2:29", 'needs quotes: "{} is ..."'),
        ("facts:\n  - [Eiffel Tower] was built by -> X\n", "2:20", "the short form needs quotes"),
        ("facts:\n  - subject: A: B\n    target: c\n", "2:15", "a text with ': ' in it needs quotes"),
        ("facts:\n  - subject: @home\n", "2:14", "a text that starts with a sign such as @ or % needs quotes"),
        ('facts:\n  - subject: "Eiffel\n    target: c\n', "4:1", "the quote opened in line 2 is never closed"),
        ("facts: [a,\n  b\n", "3:1", "while parsing a flow sequence that starts in line 1"),
        ("[" * 200_000, "1:9", "nested too deeply"),
        ("facts: [!!python/name:os.system x]\n", "1:9", "tags such as"),
        ("facts: !set {a}\n", "1:8", "tags such as '!set'"),
        ("- a\n", "1:1", "expected 'facts:' and a list of facts, found a list"),
        ("# nothing yet\n", "1:1", "found nothing but comments"),
        ("facts: {a: b}\n", "1:8", "expected a list of facts, found a mapping; begin each with '- '"),
        ("version: 1\n", "1:1", "'facts' is missing"),
        ('facts: ["[A] is -> b"]\n---\nfacts: []\n', "2:1", "a second document starts here"),
        ("facts: ['[A] is -> b']\n? [x, y]\n: z\n", "2:3", "a key must be text"),
        ("facts: [{subject: A, relation: r, prompt: {}, target: b}]\n", "1:43", "found an empty mapping {}"),
        ("facts: [{subject: A, prompt: '{} is', target: b, was: []}]\n", "1:55", "expected text, found a list"),
        ("facts: [{subject: A, prompt: '{} is', target: b, neighbors: {}}]\n", "1:61", "expected a list"),
        ("relations: [a]\nfacts: ['[A] is -> b']\n", "1:12", "expected a mapping of names to wordings, found a list"),
        ("a: \x07\n", "1:4", "the character U+0007 cannot stand in YAML"),
        (b"a: b\nc: \xffd\n", "2:4", "the byte 0xff is not UTF-8"),
    ],
)
def test_what_is_not_a_fact_file(tmp_path: Path, text: str | bytes, place: str, words: str) -> None:
    found = errors(tmp_path, text)[0]
    assert found.startswith(f"f.yaml:{place}: ")
    assert words in found


def test_errors_without_libyaml_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = errors(tmp_path, MANY)
    monkeypatch.setattr(yaml_tree, "_LOADER", yaml.SafeLoader)
    assert errors(tmp_path, MANY) == expected
    assert "needs quotes" in one(tmp_path, "facts:\n  - subject: A\n    prompt: {} is in\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('facts:\n  - {subject: *a, prompt: "{} is", target: b}\n', "2:15: the alias '*a' names nothing above it"),
        ("facts: &a\n  - *a\n", "2:5: the alias '*a' stands inside what it names"),
        ('facts:\n  - {<<: b, subject: a, prompt: "{} is", target: c}\n', "2:6: '<<' takes the alias of a mapping"),
        (
            "facts:\n  - {subject: a, prompt: '{} is', target: c, paraphrases: &p [x, '{} {}']}\n"
            "  - {subject: b, prompt: '{} is', target: c, paraphrases: *p}\n",
            "3:59: this text has 2 {}",
        ),
        (
            "facts:\n  - &f {subject: a, prompt: '{} is', target: c}\n  - {<<: *f, subject: b, target: ''}\n",
            "3:34: the target is empty",
        ),
        (
            "relations: {r: &r {prompt: is, paraphrases: []}}\nfacts:\n  - {<<: *r, subject: b, target: c}\n",
            "3:6: the prompt has no {}",
        ),
    ],
)
def test_aliases_that_are_wrong_have_their_own_place(tmp_path: Path, text: str, expected: str) -> None:
    found = errors(tmp_path, text)
    assert [line for line in found if line.startswith(f"f.yaml:{expected}")], found


def _bomb(levels: int, width: int) -> str:
    lines = ["facts:", "  - &l0 {subject: a, prompt: '{} is', target: b}"]
    for level in range(1, levels):
        lines.append(f"  - &l{level} [{', '.join([f'*l{level - 1}'] * width)}]")
    return "\n".join(lines) + "\n"


def test_a_file_that_grows_without_end_by_its_aliases_is_refused(tmp_path: Path) -> None:
    started = time.monotonic()
    (large,) = errors(tmp_path, _bomb(7, 100))
    assert large == "f.yaml:5:245: with its aliases written out, the file is larger than 64 MB"
    (deep,) = errors(tmp_path, _bomb(12, 2))
    assert "nested too deeply" in deep
    text = "x" * 10**6
    wide = f"facts:\n  - {{subject: &t {text}, prompt: '{{}} is', target: b}}\n"
    wide += "  - {subject: *t, prompt: '{} was', target: b}\n" * 100
    assert "is larger than 64 MB" in errors(tmp_path, wide)[0]
    assert time.monotonic() - started < 20


def test_tabs_are_refused_outside_comments(tmp_path: Path) -> None:
    assert errors(tmp_path, "facts:\n\t- a\n  - b\tc\n  # x\ty\n") == [
        "f.yaml:2:1: a tab; indent with spaces",
        "f.yaml:3:6: a tab; use spaces, or \\t inside double quotes",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Eiffel Tower was -> built -> by", "expected one '->' between prompt and target, found 2"),
        ("[Eiffel Tower] was", "expected one '->' between prompt and target, found none"),
        ("[A] and [B] are -> c", "needs exactly one subject in [brackets]; found 2"),
        ("[A] and B] are -> c", "needs exactly one subject in [brackets]; found other brackets too"),
        ("[A] is {} -> c", "names its subject in [brackets]; it takes no {}"),
        ("[A] is ->", "nothing stands behind the '->'"),
        ("[ ] is -> c", "the brackets hold no subject"),
    ],
)
def test_wrong_short_forms(tmp_path: Path, text: str, words: str) -> None:
    assert words in one(tmp_path, "facts:\n  - " + json.dumps(text))


def test_a_wrong_prompt_proposes_the_right_one_whatever_its_case(tmp_path: Path) -> None:
    found = one(tmp_path, 'facts:\n  - {subject: the moon, target: cheese, prompt: "The Moon is \\"made\\" of"}\n')
    assert found.endswith(r'the prompt has no {}; write "{} is \"made\" of"')


def test_an_id_given_twice_is_an_error(tmp_path: Path) -> None:
    facts = [{"subject": name, "prompt": "{} is", "target": "x", "id": "same"} for name in ("A", "B", "C")]
    found = errors(tmp_path, "\n".join(map(json.dumps, facts)), "f.jsonl")
    assert [line.split(" the fact")[0] for line in found] == [
        "f.jsonl:2:58: the id 'same' belongs to",
        "f.jsonl:3:58: the id 'same' belongs to",
    ]


def test_conflicts_are_refused_with_both_places(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(
        """relations: {capital: {prompt: "The capital of {} is"}}
facts:
  - {subject: Eiffel Tower, prompt: "{} is in", target: Rome}
  - {subject: "Eiffel  Tower", prompt: "{}  is in", target: Oslo}
  - {subject: Peru, relation: capital, target: Cusco}
  - {subject: Peru, relation: capital, prompt: "{} is ruled from", target: Lima}
  - {subject: Peru, relation: port, prompt: "{} ships from", target: Callao}
  - {subject: peru, relation: capital, target: Ica}
  - {subject: Louvre, prompt: "The {} stands in", target: Rome}
  - {subject: The  Louvre, prompt: "{} stands in", target: Oslo}
  - {subject: The Louvre, prompt: "{} stands in", target: Rome}
"""
    )
    with pytest.raises(Refused) as caught:
        load_facts(path)
    assert caught.value.exit_code == 3
    assert [line.replace(f"{tmp_path}/", "") for line in caught.value.details] == [
        "f.yaml:4:5: 'Eiffel  Tower' -> 'Oslo' contradicts 'Rome' for the same prompt at f.yaml:3:5",
        "f.yaml:6:5: 'Peru' -> 'Lima' contradicts 'Cusco' for the same relation 'capital' at f.yaml:5:5",
        "f.yaml:10:5: 'The  Louvre' -> 'Oslo' contradicts 'Rome' for the same sentence at f.yaml:9:5",
    ]


def test_long_lists_of_errors_are_cut(tmp_path: Path) -> None:
    found = errors(tmp_path, "facts:\n" + "  - a\n" * 1000)
    assert len(found) == 51
    assert found[-1] == "and 950 more"
    assert limited(["a", "b"], shown=2) == ("a", "b")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(name: str) -> str:
        with pytest.raises(BadInput) as caught:
            load_facts(tmp_path / name)
        return " ".join([caught.value.message, *caught.value.details, caught.value.hint or ""])

    (tmp_path / "news.yaml").write_text("")
    (tmp_path / "none.yaml").write_text("facts: []")
    (tmp_path / "wide.yaml").write_bytes("facts: []".encode("utf-16"))
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "facts.txt").write_text("x")
    assert message("news.yml").startswith("There is no such file")
    assert message("news.yml").endswith("news.yaml?")
    assert message("nowhere/news.yml") == "There is no such file "
    assert "empty" in message("news.yaml")
    assert "no facts" in message("none.yaml")
    assert "UTF-16" in message("wide.yaml")
    assert "folder" in message("folder.yaml")
    assert "expected a name in .yaml" in message("facts.txt")
    monkeypatch.setattr(loading, "LARGEST", 5)
    assert "too large" in message("none.yaml")


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": "{} is", "target": "b"},
        {"subject": "A", "prompt": "is", "target": "b"},
        {"subject": "A", "prompt": "{} is", "target": 3},
        {"subject": "A", "prompt": "{} is", "target": "b", "paraphrases": "x"},
        {"subject": "A", "prompt": "{} is", "target": "b", "paraphrases": [1]},
        {"subject": "A", "prompt": "{} is", "target": "b", "neighbors": ["x"]},
        {"subject": "A", "prompt": "{} is", "target": "b", "neighbors": [{"target": "x"}]},
    ],
)
def test_facts_from_a_manifest_are_checked(data: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        Fact.from_dict(data)
