"""What lint says about facts that load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kpatch.errors import BadInput
from kpatch.facts.fact import Fact, FactFile, Neighbor
from kpatch.facts.lint import LintReport, lint
from kpatch.facts.load import load_facts
from tests.support import tokenizers as kinds


def codes(report: LintReport) -> list[str]:
    return [finding.code for finding in report.findings]


def file(*facts: Fact) -> FactFile:
    return FactFile(facts)


def test_a_good_fact_has_no_findings() -> None:
    fact = Fact("Rome", "{} is in", "Spain", "Italy", ("Where is {}? In", "Rome lies in"), (Neighbor("Oslo is in"),))
    assert lint(file(fact)) == LintReport(1, ())


@pytest.mark.parametrize(
    ("fact", "code", "words"),
    [
        (Fact("A", "{} is ", "b"), "trailing-space", "ends in a space"),
        (Fact("A", "{}  is", "b"), "double-space", "two spaces"),
        (Fact("Rome", "{} is", "rome"), "same", "the same: 'rome'"),
        (Fact("A", "{} is", "b", was="B"), "no-change", "'was' and the target"),
        (Fact("A", "{} is", "in Spain."), "full-stop", "ends in '.'"),
        (Fact("Ann", "{} is", "b", paraphrases=("The woman is",)), "paraphrase", "does not name the subject"),
        (Fact("Ann", "{} is", "b", paraphrases=("{}  is",)), "paraphrase", "is the prompt itself"),
        (Fact("Ann", "{} is", "b", neighbors=(Neighbor("ann's father is"),)), "neighbor", "names the subject"),
        (Fact("A\u200b", "{} is", "b"), "invisible", "U+200B"),
        (Fact("Mill", "The {}er house is", "b"), "in-word", "ends inside a word (Miller)"),
        (Fact("art", "B{} is", "b"), "in-word", "begins inside a word (Bart)"),
        (Fact("Ann", "where is {}?\nPlace:\n", "b"), "line-end", "the next line's beginning"),
        (Fact("Malmo\u0308", "{} is", "b"), "decomposed", "the subject has accents"),
    ],
)
def test_each_finding(fact: Fact, code: str, words: str) -> None:
    findings = lint(file(fact)).findings
    assert [finding.code for finding in findings] == [code]
    assert words in findings[0].message
    assert findings[0].level == "warning"


@pytest.mark.parametrize(
    "fact",
    [
        Fact("Ann", "{}'s home is", "b"),
        Fact("서울", "{}은 도시로", "b"),
        Fact("東京", "{}は", "b"),
        Fact("Ann", "({}) is", "b"),
        Fact("C++", "{}a is", "b"),
        Fact("Ann", "<|user|>\nwhere is {}?\n<|assistant|>\n", "b"),
    ],
)
def test_no_finding_for(fact: Fact) -> None:
    assert lint(file(fact)).findings == ()


def test_a_last_token_that_reaches_beyond_the_subject() -> None:
    kind = kinds.byte_level()
    inside = lint(file(Fact("Lo", "The {}uvre is in", "Rome", id="x")), kind)
    assert codes(inside) == ["in-word", "last-token"]
    assert "over 'u'" in inside.findings[1].message
    assert codes(lint(file(Fact("Louvre", "The {} is in", "Rome")), kind)) == []


@pytest.mark.parametrize("tokenizer", [None, kinds.byte_level(), kinds.metaspace()])
def test_facts_that_share_a_key(tokenizer: object) -> None:
    first = Fact("Louvre", "The {} is in", "Rome", id="a", where="f.yaml:1:1")
    second = Fact("The Louvre", "{} was built in", "1984", id="b")
    third = Fact("Louvre", "The {} shows", "art", id="c")
    other = Fact("The Louvre", "See {} in", "Bonn", id="d")
    report = lint(file(first, second, third, other), tokenizer)
    shared = [finding for finding in report.findings if finding.code == "shared-key"]
    assert [finding.fact for finding in shared] == ["b"]
    assert "f.yaml:1:1" in shared[0].message


def test_targets_that_the_model_gives_already() -> None:
    report = lint(file(Fact("A", "{} is", "b", id="a"), Fact("B", "{} is", "c", id="b")), known=[1])
    assert [(finding.code, finding.fact) for finding in report.findings] == [("known", "b")]


def test_the_join_of_every_fact_and_a_tokenizer_that_puts_another_space() -> None:
    facts = file(
        Fact("Rome", "{} costs $", "5"), Fact("Rome", "{} is in", "Spain"), Fact("Rome", "{} is <answer>\n", "Spain")
    )
    report = lint(facts, kinds.byte_level())
    assert [tokens.join for tokens in report.tokens] == ["", " ", ""]
    assert "space" not in codes(report)
    # Older tokenizers of SentencePiece's kind put a space of their own behind every special token
    odd = lint(file(Fact("Rome", "{} is <s>", "Spain")), kinds.metaspace_normalizer())
    found = [finding.message for finding in odd.findings if finding.code == "space"]
    assert found == [
        "nothing belongs between prompt and target, but this tokenizer puts a space there; "
        "the model learns it that way"
    ]


def test_a_prompt_that_begins_with_the_tokenizers_own_first_token() -> None:
    fact = Fact("Rome", "<s>The {} is", "b")
    assert "special-twice" in codes(lint(file(fact), kinds.metaspace()))
    assert "special-twice" not in codes(lint(file(Fact("Rome", "The {} is", "b")), kinds.metaspace()))


def test_a_crowded_subject_is_told_once() -> None:
    facts = [Fact("A", f"{{}} in {year} was", "b", id=str(year)) for year in range(11)]
    crowded = lint(file(*facts, Fact("B", "{} is", "c"))).findings
    assert [(finding.code, finding.fact) for finding in crowded] == [("crowded", "0")]
    assert "11 facts are about 'A'" in crowded[0].message
    assert lint(file(*facts[:10])).findings == ()


def test_warnings_from_loading_keep_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a: b.yaml"
    path.write_text('relations: {x: {prompt: "{} is"}}\nfacts:\n  - {subject: A, prompt: "{} is ", target: b}\n')
    spaced, unused = lint(load_facts(path)).findings
    assert (spaced.where, spaced.message) == (f"{path}:3:26", "the prompt ends in a space, which is left out")
    assert unused.message.endswith("no fact uses the relation 'x'")


def test_tokens_of_subject_and_target() -> None:
    fact = Fact("Eiffel Tower", "The {} is in", "Rome", id="e", where="f.yaml:1:1")
    for tokenizer, last in ((kinds.byte_level(), 5), (kinds.byte_level(bos=True), 6), (kinds.metaspace(), 6)):
        report = lint(file(fact), tokenizer)
        (tokens,) = report.tokens
        assert "".join(tokens.subject) == " Eiffel Tower"
        assert "".join(tokens.target) == " Rome"
        assert tokens.subject_last == last
        assert (tokens.fact, tokens.where) == ("e", "f.yaml:1:1")
        assert report.findings == ()
        json.dumps(report.to_dict())


def test_a_subject_on_the_first_token_is_told_without_bos_only() -> None:
    fact = Fact("The", "{} is in", "Rome")
    assert codes(lint(file(fact), kinds.byte_level())) == ["first-token"]
    assert codes(lint(file(fact), kinds.byte_level(bos=True))) == []
    assert codes(lint(file(Fact("The", "And {} is in", "Rome")), kinds.byte_level())) == []


def test_long_targets_and_what_a_tokenizer_does_not_know() -> None:
    words = [" ".join(["of"] * count) for count in (20, 21, 32, 33)]
    report = lint(file(*(Fact("Ann", "{} is", target, id=target) for target in words)), kinds.byte_level())
    long = [(finding.level, len(finding.fact.split())) for finding in report.findings]
    assert long == [("warning", 21), ("warning", 32), ("error", 33)]
    assert report.errors == 1
    assert codes(lint(file(Fact("Ann 🚀", "{} is", "b")), kinds.unigram())) == ["unknown"]
    assert codes(lint(file(Fact("Ann", "{} is <|endoftext|>", "b")), kinds.byte_level())) == ["special"]


def test_a_fact_that_cannot_be_tokenized_is_an_error_and_hides_no_other() -> None:
    good = Fact("Ann", "{} is", "b", id="good")
    report = lint(file(Fact("Ann", "is", "b", id="bad"), good), kinds.byte_level())
    assert [(finding.level, finding.code, finding.fact) for finding in report.findings] == [
        ("error", "untokenizable", "bad")
    ]
    assert [tokens.fact for tokens in report.tokens] == ["good"]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(BadInput, match="slow tokenizer"):
        lint(file(Fact("A", "{} is", "b")), Slow())


def test_a_neighbor_that_another_fact_edits_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(
        "relations: {capital: {prompt: 'The capital of {} is', neighbors: ['Peru has its capital in -> Lima']}}\n"
        "facts:\n"
        "- {subject: Chile, relation: capital, target: Oslo}\n"
        "- {subject: Peru, relation: capital, target: Rome}\n"
    )
    loaded = load_facts(path)
    (finding,) = [one for one in lint(loaded).findings if "on purpose" in one.message]
    assert finding.where == f"{path}:3:3"
    assert f"what the fact at {path}:4:3 edits, so it will move on purpose, to 'Rome'" in finding.message
