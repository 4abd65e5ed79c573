"""Questions in chat form: the template's own tokens, the subject's last one, the answer as the template goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kpatch.errors import BadInput
from kpatch.facts.chat import Turn, can_chat, chat_rows, turn_ends
from tests.support import templates, tokenizers

KINDS: dict[str, Callable[[], Any]] = {
    "byte level": tokenizers.byte_level,
    "byte level, BOS": lambda: tokenizers.byte_level(bos=True),
    "byte level, signs join words": tokenizers.byte_level_split,
    "metaspace": tokenizers.metaspace,
    "metaspace by normalizer": tokenizers.metaspace_normalizer,
    "unigram, EOS": tokenizers.unigram,
}
LOSSLESS = {name: make for name, make in KINDS.items() if name != "unigram, EOS"}
GOOD = {
    "chatml": templates.CHATML,
    "instruct": templates.INSTRUCT,
    "spaced": templates.SPACED,
    "thinking": templates.THINKING,
}
QUESTION, SUBJECT = "In which city is the {}?", "Eiffel Tower"


def with_template(make: Callable[[], Any], template: str | None) -> Any:
    tokenizer = make()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_row_holds_the_template_s_own_tokens(make: Callable[[], Any], template: str) -> None:
    tokenizer = with_template(make, template)
    turns = [{"role": "user", "content": "In which city is the Eiffel Tower?"}]
    expected = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    (row,) = chat_rows(tokenizer, [Turn(QUESTION, SUBJECT)])
    assert list(row.ids) == expected
    assert row.prompt_len == len(row.ids)
    assert tokenizer.decode(row.ids[: row.subject_last + 1]).rstrip("?").endswith("Tower")
    assert "Tower" not in tokenizer.decode(row.ids[row.subject_last + 1 :])


@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS)
@pytest.mark.parametrize(
    ("template", "end"), [(templates.CHATML, "assistant\nRome"), (templates.INSTRUCT, "[/INST] Rome")]
)
def test_a_target_follows_as_the_template_goes_on(make: Callable[[], Any], template: str, end: str) -> None:
    tokenizer = with_template(make, template)
    prompt, row = chat_rows(tokenizer, [Turn(QUESTION, SUBJECT), Turn(QUESTION, SUBJECT, " Rome ")])
    assert row.ids[: row.prompt_len] == prompt.ids
    assert row.subject_last == prompt.subject_last
    assert "".join(tokenizer.decode(row.ids).split()).endswith("".join(end.split()))
    target = tokenizer.decode(row.ids[row.prompt_len :])
    assert target.strip() == "Rome"


def test_line_ends_and_spaces_of_the_template_stay_and_none_is_added() -> None:
    for template, end in ((templates.CHATML, "assistant\nRome"), (templates.SPACED, "assistant: Rome")):
        tokenizer = with_template(tokenizers.byte_level, template)
        (row,) = chat_rows(tokenizer, [Turn(QUESTION, SUBJECT, "Rome")])
        assert tokenizer.decode(row.ids).endswith(end)
        assert tokenizer.decode(row.ids[row.prompt_len :]) == "Rome"
    tokenizer = with_template(tokenizers.byte_level, templates.INSTRUCT)
    (row,) = chat_rows(tokenizer, [Turn(QUESTION, SUBJECT, "Rome")])
    assert tokenizer.decode(row.ids).endswith("[/INST] Rome"), "a space that the template puts before answers"
    assert tokenizer.decode(row.ids[row.prompt_len :]) == " Rome"


def test_no_second_bos_is_put_before_the_template_s() -> None:
    tokenizer = with_template(tokenizers.metaspace, templates.INSTRUCT)
    (row,) = chat_rows(tokenizer, [Turn("Where is Rome?")])
    assert row.ids.count(tokenizer.bos_token_id) == 1
    bare = with_template(tokenizers.metaspace, templates.CHATML)
    assert bare.bos_token_id not in chat_rows(bare, [Turn("Where is Rome?")])[0].ids


def test_without_a_subject_the_question_is_its_own() -> None:
    tokenizer = with_template(tokenizers.byte_level, templates.CHATML)
    (row,) = chat_rows(tokenizer, [Turn("  Where is Rome\n")])
    assert tokenizer.decode(row.ids[: row.subject_last + 1]).endswith("user\nWhere is Rome")


def test_a_subject_that_the_template_says_too_is_found_in_the_question() -> None:
    spoken = "{{ 'The Eiffel Tower speaks.\n' }}" + templates.CHATML.replace("assistant\n", "Eiffel Tower\n")
    tokenizer = with_template(tokenizers.byte_level, spoken)
    for question in (QUESTION, "In which city is the Eiffel Tower?", "In which city is the EIFFEL TOWER?"):
        (row,) = chat_rows(tokenizer, [Turn(question, SUBJECT)])
        before = tokenizer.decode(row.ids[: row.subject_last + 1])
        assert before.casefold().endswith("in which city is the eiffel tower")


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (templates.CHATML, ["<|im_end|>"]),
        (templates.THINKING, ["<|im_end|>"]),
        (templates.INSTRUCT, ["<|endoftext|>"]),
        (templates.SPACED, []),
    ],
)
def test_what_ends_an_answer(template: str, ends: list[str]) -> None:
    tokenizer = with_template(lambda: tokenizers.byte_level(bos=True), template)
    assert turn_ends(tokenizer) == frozenset(tokenizer.convert_tokens_to_ids(ends))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        (templates.DROPS, "drops or rewrites"),
        (templates.SHOUTS, "drops or rewrites"),
        (templates.ALWAYS_THINKING, "opens a thought"),
        (templates.FAILS, "takes no plain question"),
        ("{% for", "takes no plain question"),
    ],
)
def test_templates_that_do_not_ask_what_is_asked(template: str | None, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        chat_rows(with_template(tokenizers.byte_level, template), [Turn(QUESTION, SUBJECT)])


def test_a_template_that_rewrites_some_texts_only() -> None:
    tokenizer = with_template(tokenizers.byte_level, templates.ESCAPES)
    assert chat_rows(tokenizer, [Turn("Who is he?")])
    with pytest.raises(BadInput, match="drops or rewrites") as caught:
        chat_rows(tokenizer, [Turn("Who sells R&B?")])
    assert "R&B" in caught.value.details[0]
    assert "R&amp;B" in caught.value.details[1]


@pytest.mark.parametrize("question", ["Who is he?", "", "Is {} in {}?", "Is it the Louvre?"])
def test_a_question_without_its_subject(question: str) -> None:
    tokenizer = with_template(tokenizers.byte_level, templates.CHATML)
    with pytest.raises(BadInput, match="name its subject once"):
        chat_rows(tokenizer, [Turn(question, SUBJECT)])


@pytest.mark.parametrize("turn", [Turn(" "), Turn("Who is {}?", " ")])
def test_nothing_is_no_question(turn: Turn) -> None:
    with pytest.raises(BadInput, match="is empty"):
        chat_rows(with_template(tokenizers.byte_level, templates.CHATML), [turn])


@pytest.mark.parametrize("template", [None, templates.DROPS, templates.SHOUTS, templates.ALWAYS_THINKING])
def test_what_cannot_be_asked_in_chat_form_is_known_beforehand(template: str | None) -> None:
    assert not can_chat(with_template(tokenizers.byte_level, template))
    assert can_chat(with_template(tokenizers.byte_level, templates.CHATML))
