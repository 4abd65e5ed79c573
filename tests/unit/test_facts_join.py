"""What stands between a prompt and its target, by the rules of writing, and in tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.facts.join import join, trimmed
from kpatch.facts.load import load_facts
from kpatch.facts.tokens import Item, encode, encode_many, encode_target
from kpatch.facts.write import write_facts
from tests.support import tokenizers as kinds

TOGETHER = [
    ("The web site is www.", "rome.it"),
    ("The web site is https://rome.", "it"),
    ("Write to mayor@rome.", "it"),
    ("She stands 5'", "11"),
    ("She stands 5′", "11 tall"),
    ("He sits in the cafe", "\u0301 de Paris"),
    ("The word is क", "ि"),
    ("The family is 👩", "\u200d👧"),
    ("It cost the taxpayer $", "5 billion"),
    ("It cost US$", "5"),
    ("Its ticker is $", "KPTC"),
    ("The price is €", "5"),
    ("She writes only non-", "fiction"),
    ("The temperature is -", "5 degrees"),
    ("The flag is --", "verbose"),
    ("He is on Twitter as @", "bentarrow"),
    ("The web site is https://", "kiruna.no"),
    ("Its file is C:\\", "boot.ini"),
    ("It came in at #", "7"),
    ("The function is snake_", "case"),
    ("Call +", "47 22"),
    ("He lived 1914–", "1918"),
    ("One city—", "Rome"),
    ("It is an AT&", "T phone"),
    ("Let x=", "5"),
    ("The mood (", "calm"),
    ("The list [", "a"),
    ("The set {", "a"),
    ("He wrote “", "Rome"),
    ("He wrote ‘", "Rome"),
    ("Er schrieb „", "Rom"),
    ("Er schrieb »", "Rom"),
    ("Il écrit «", "Rome"),
    ("Han skrev ”", "Rom"),
    ("he wrote **", "Rome"),
    ("He wrote ('", "Rome"),
    ("Il est né en l'", "Italie"),
    ("La ville d’", "Oslo"),
    ("user<|end|><|assistant|>", "Rome"),
    ("<answer>", "Rome"),
    ("It lies at 45°", "N"),
    ("She owns exactly 50", "% of it"),
    ("It is Rome", ", Italy"),
    ("It is Rome", "."),
    ("It is Rome", "; yes"),
    ("It is Rome", ": the city"),
    ("It is Rome", "!"),
    ("It is Rome", "?"),
    ("(it is Rome", ")"),
    ("[it is Rome", "]"),
    ("{it is Rome", "}"),
    ("It is Rome", "'s south"),
    ("It is Rome", "’s south"),
    ("They", "'ll come"),
    ("“It is Rome", "” he said"),
    ('"It is Rome', '" he said'),
    ("Il fait 20", "°C"),
    ("It grew 3", ".5 percent"),
    ("Its site is kiruna", ".no"),
    ("It came in 5", "th in the race"),
    ("首都は", "東京"),
    ("首都：", "Tokyo"),
    ("成立于", "1984年"),
    ("成立于1984", "年"),
    ("The name is 東京", "。"),
    ("assistant\n", "Rome"),
    ("Capital:\t", "Rome"),
]
APART = [
    ("He knows the www.", "Rome is next"),
    ("It is at https://rome.it.", "Rome is next"),
    ("It was so.", "then it ended"),
    ("It is the 1990s'", "11 best"),
    ("is in", "Rome"),
    ("Answer:", "Rome"),
    ("It is Rome,", "Italy"),
    ("It is 50%", "full"),
    ("It costs 50 $", "a month"),
    ("It costs 50€", "a month"),
    ("The capital -", "Rome"),
    ("The capital –", "Rome"),
    ("Smith &", "Sons"),
    ("x =", "5"),
    ("He writes C++", "code"),
    ("He writes C#", "code"),
    ("Er schrieb „Rom“", "und ging"),
    ("Er schrieb »Rom«", "und ging"),
    ("Il écrit «Rome»", "et part"),
    ("He wrote “Rome”", "and left"),
    ("It is the players'", "choice"),
    ('A 5"', "pipe"),
    ("He wrote **Rome**", "and left"),
    ("He wrote _Rome_", "and left"),
    ("It turns by 90°", "at once"),
    ("A model ->", "Rome"),
    ("<b>Rome</b>", "is it"),
    ("It costs", "$5"),
    ("It costs", ".5 million"),
    ("It is built with", ".NET"),
    ("They speak", "!Xóõ"),
    ("It is from the", "'90s"),
    ("She said", '"Rome"'),
    ("She said", "“Rome”"),
    ("He came in", "third"),
    ("In 1984", "they met"),
    ("수도는", "서울"),
    ("the capital is", "東京"),
    ("首都は", "Tokyo"),
    ("ก่อตั้งเมื่อปี", "1984"),
    ("הבירה היא", "רומא"),
]


@pytest.mark.parametrize(("text", "target"), TOGETHER)
def test_nothing_stands_between(text: str, target: str) -> None:
    assert join(text, target) == ""
    assert join(text, target, space=True) == ("" if text[-1].isspace() else " ")


@pytest.mark.parametrize(("text", "target"), APART)
def test_a_space_stands_between(text: str, target: str) -> None:
    assert join(text, target) == " "
    assert join(text, target, space=False) == ""


def test_line_ends_stay_and_spaces_go() -> None:
    assert trimmed("  a b \n \t ") == "a b \n \t"
    assert trimmed(" \n a\u3000") == "\n a"


@pytest.mark.parametrize("sign", ["\u00a0", "\u202f"])
def test_a_no_break_space_at_the_end_stays_and_takes_the_place_of_the_space(sign: str) -> None:
    assert trimmed(f"{sign}a{sign} ") == f"a{sign}"
    assert join(f"Il dit : «{sign}", "Rome") == ""


ALL_KINDS = {
    "byte level": kinds.byte_level(),
    "byte level, signs join words": kinds.byte_level_split(),
    "metaspace": kinds.metaspace(),
    "metaspace by normalizer": kinds.metaspace_normalizer(),
}


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize(
    ("prompt", "target", "space", "whole"),
    [
        ("user: where is {}?\nassistant:\n", "Rome", None, "user: where is Paris?\nassistant:\nRome"),
        ("where is {}?\n\n", "Rome", None, "where is Paris?\n\nRome"),
        ("{} costs $", "5 billion", None, "Paris costs $5 billion"),
        ("{} dit : «\u00a0", "Rome", None, "Paris dit : «\u00a0Rome"),
        ("{} is non-", "fiction", None, "Paris is non-fiction"),
        ("{} owns 50", "% of it", None, "Paris owns 50% of it"),
        ("{} is anti", "body", False, "Paris is antibody"),
        ("{} is at (", "the sea", True, "Paris is at ( the sea"),
    ],
)
def test_rows_hold_the_join(kind: str, prompt: str, target: str, space: bool | None, whole: str) -> None:
    tokens = ALL_KINDS[kind]
    row = encode(tokens, prompt, "Paris", target, space=space)
    assert tokens.decode(row.ids, skip_special_tokens=True) == whole
    text = prompt.replace("{}", "Paris")
    assert row.ids[row.prompt_len :] == encode_target(tokens, text, target, space)
    # A text that is asked as a whole, as neighbors are, is tokenized alike
    assert encode(tokens, "{}", text, target, space=space).ids == row.ids


_LETTERS = "aé東한 ж.,:;!?'\"“”„«»‘’()[]{}<>|$€%°#@/\\-–—&=+*_~0123\n\t\u00a0"


@settings(max_examples=2 * settings.default.max_examples)
@given(
    st.text(_LETTERS, max_size=8).filter(lambda text: "{}" not in text),
    st.text("ab東 ", min_size=1, max_size=4).filter(str.strip),
    st.text(_LETTERS, min_size=1, max_size=5).filter(str.strip),
    st.sampled_from([None, True, False]),
)
def test_prompt_join_and_target_come_back_from_tokens(
    behind: str, subject: str, target: str, space: bool | None
) -> None:
    prompt = "We say {}" + behind
    text = ("We say " + subject.strip() + behind) if behind else "We say " + subject.strip()
    text = text[: len(text)].rstrip(" ") if not text.endswith(("\n", "\t")) else text
    between = join(text, target.strip(), space)
    assert between in ("", " ")
    for tokens in ALL_KINDS.values():
        row = encode(tokens, prompt, subject, target, space=space)
        assert tokens.decode(row.ids, skip_special_tokens=True) == text + between + target.strip()


def load(tmp_path: Path, text: str, name: str = "f.yaml") -> tuple[Fact, ...]:
    (tmp_path / name).write_text(text)
    return load_facts(tmp_path / name).facts


def test_space_is_a_key_of_facts_and_relations_in_every_kind_of_file(tmp_path: Path) -> None:
    text = """relations: {share: {prompt: "{} owns 50", space: false}}
facts:
  - {subject: A, relation: share, target: kg}
  - {subject: B, relation: share, target: kg, space: true}
  - {subject: C, prompt: "{} is anti", target: body, space: False}
  - {subject: D, prompt: "{} is", target: body, space: }
"""
    assert [fact.space for fact in load(tmp_path, text)] == [False, True, False, None]
    lines = '{"subject": "A", "prompt": "{} is anti", "target": "body", "space": false}\n'
    assert load(tmp_path, lines, "f.jsonl")[0].space is False
    table = "subject,prompt,target,space\nA,{} is anti,body,FALSE\nB,{} is,body,\n"
    assert [fact.space for fact in load(tmp_path, table, "f.csv")] == [False, None]
    with pytest.raises(BadInput) as caught:
        load(tmp_path, 'facts:\n  - {subject: A, prompt: "{} is", target: b, space: no}\n')
    assert caught.value.details[0].endswith("f.yaml:2:53: expected true or false, found 'no'")


@pytest.mark.parametrize("name", ["f.yaml", "f.jsonl"])
def test_space_and_line_ends_are_written_and_read_back(tmp_path: Path, name: str) -> None:
    facts = [
        Fact("A", "where is {}?\n\n", "b", space=False, paraphrases=("{}?\n",), id="a"),
        Fact("B", "\n{} is", "b", space=True, id="b"),
        Fact("C", "{} is", "b", id="c"),
    ]
    write_facts(tmp_path / name, facts)
    assert load_facts(tmp_path / name).facts == tuple(facts)
    assert [Fact.from_dict(fact.to_dict()) for fact in facts] == facts
    assert ["space" in fact.to_dict() for fact in facts] == [True, True, False]
    with pytest.raises(BadInput, match="true or false"):
        Fact.from_dict({"subject": "A", "prompt": "{} is", "target": "b", "space": "false"})


def test_items_of_four_and_five_parts_go_together() -> None:
    tokens: Any = ALL_KINDS["byte level"]
    short, long = encode_many(tokens, [("{} is", "Paris", "Rome", ""), Item("{} is", "Paris", "Rome", space=False)])
    assert (tokens.decode(short.ids), tokens.decode(long.ids)) == ("Paris is Rome", "Paris isRome")
