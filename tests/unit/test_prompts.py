"""Prompts as tokens: decoded text is what was meant, for every kind of tokenizer and for all sorts of script."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from kpatch.errors import BadInput
from kpatch.facts import tokens
from kpatch.facts.fact import Fact
from kpatch.facts.join import join, without_spaces_behind
from kpatch.facts.tokens import (
    Encoded,
    Item,
    check_lengths,
    encode,
    encode_many,
    encode_target,
    lead_ids,
    require_fast,
)
from tests.support import tokenizers as kinds

KINDS: dict[str, Callable[[], Any]] = {
    "byte level": kinds.byte_level,
    "byte level, BOS": lambda: kinds.byte_level(bos=True),
    "byte level, signs join words": kinds.byte_level_split,
    "metaspace": kinds.metaspace,
    "metaspace, no BOS": lambda: kinds.metaspace(bos=False),
    "metaspace by normalizer": kinds.metaspace_normalizer,
    "unigram, EOS": kinds.unigram,
}
LOSSLESS = [kind for kind in KINDS if kind != "unigram, EOS"]
_PRE = ["", "The ", "the mother tongue of ", "What is the twin city of ", "(", '"', "¿", "首都は", "Q: who made ", "é"]
_POST = [
    " is in the city of",
    "'s capital is",
    " is",
    ", born in",
    "",
    "の首都は",
    "? It is",
    ' plays "',
    " (",
    "x is",
    "\n",
]
_PREFIX = ["", "", "Therefore, I think. ", "昔々。", "Because the sea is cold,\n", "Façade ", "  "]
_NAMES = [
    "Eiffel Tower",
    "Chicago",
    "São Paulo",
    "Łódź",
    "東京",
    "北京市",
    "서울",
    "Москва",
    "👩‍👩‍👧",
    "Zoë",
    "C++",
    "X Æ A-12",
]
_NAMES += [
    "e\u0301cole",
    "1984",
    "O'Neill",
    "AT&T",
    "St. John's",
    "Αθήνα",
    "नई दिल्ली",
    "กรุงเทพ",
    "Mal\u00f6",
    "a",
    "{}x",
    "🚀",
]


@cache
def tokenizer(kind: str) -> Any:
    return KINDS[kind]()


def records(count: int, seed: int) -> list[Item]:
    """(prompt, subject, target, prefix) from all sorts of parts, some with the subject's text elsewhere too."""
    rng = random.Random(seed)
    letters = "abcdefgh tuvwxyz éüßøñ ABC 東京都 日本 가나 дом λμ 0123 -.,'&/" + "👍🏽🇫🇷"

    def name() -> str:
        if rng.random() < 0.5:
            return rng.choice(_NAMES)
        made = "".join(rng.choice(letters) for _ in range(rng.randint(1, 14))).strip()
        return made or "x"

    made = []
    for _ in range(count):
        subject, prefix = name(), rng.choice(_PREFIX)
        pre, post = rng.choice(_PRE), rng.choice(_POST)
        if rng.random() < 0.2:
            pre = f"{subject} and {pre}"
        if rng.random() < 0.1:
            post = f"{post} near {subject} in"
        if rng.random() < 0.1:
            post += " "
        made.append((pre.replace("{}", "") + "{}" + post.replace("{}", ""), subject, name(), prefix))
    return made


def meant(item: Item) -> tuple[str, int, str]:
    """The text in front of the target, the position of the subject's last character, the target with its space."""
    prompt, subject, target, prefix = item[:4]
    before, after = prompt.split("{}")
    text = without_spaces_behind(prefix + before + subject + after)
    return text, len(prefix + before + subject) - 1, join(text, target or "") + (target or "")


def decode(tokens: Any, ids: tuple[int, ...]) -> str:
    return str(tokens.decode(list(ids), clean_up_tokenization_spaces=False))


def check(kind: str, items: list[Item], rows: list[Encoded]) -> None:
    tokens = tokenizer(kind)
    lead = len(lead_ids(tokens))

    def decoded(part: Callable[[Encoded], slice]) -> list[str]:
        found = [list(row.ids[part(row)]) for row in rows]
        return list(tokens.backend_tokenizer.decode_batch(found, skip_special_tokens=False))

    expected = [meant(item) for item in items]
    own = tokens([text for text, _, _ in expected], padding=False)["input_ids"]
    prompts = decoded(lambda row: slice(lead, row.prompt_len))
    covers = decoded(lambda row: slice(lead, row.subject_last + 1))
    shorts = decoded(lambda row: slice(lead, row.subject_last))
    wholes = decoded(lambda row: slice(lead, None))
    for index, (text, last, target) in enumerate(expected):
        item, row, prompt = items[index], rows[index], prompts[index]
        # Decoders of SentencePiece's kind drop a space at the text's start
        lost = text.startswith(" ") and not prompt.startswith(text[:2])
        assert prompt == text[lost:], item
        # What a user's own call of the tokenizer gives, BOS and all
        assert list(row.ids[: row.prompt_len]) == own[index], item
        # Up to the subject's last token its last character is all there; one token less, and it is not
        upto = text[lost : last + 1]
        assert covers[index].startswith(upto), item
        assert not shorts[index].startswith(upto), item
        assert wholes[index] == prompt + target, item
        assert tokens.eos_token_id not in row.ids, item


@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_record_of_a_large_set_decodes_to_what_was_meant(kind: str) -> None:
    items = records(1_000, seed=LOSSLESS.index(kind))  # 6,000 of them over all kinds
    check(kind, items, encode_many(tokenizer(kind), items))


_text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12).map(
    lambda s: s.replace("{}", "")
)
_name = _text.map(str.strip).filter(bool)


@given(st.sampled_from(LOSSLESS), _text, _name, _text, _name, _text)
@settings(max_examples=3 * settings.default.max_examples)
def test_any_record_decodes_to_what_was_meant(
    kind: str, before: str, subject: str, after: str, target: str, prefix: str
) -> None:
    template = before + "{}" + after
    if template.count("{}") == 1:
        item = (template, subject, target, prefix)
        check(kind, [item], [encode(tokenizer(kind), *item)])


def test_a_tokenizer_that_loses_characters_still_finds_the_subject() -> None:
    """Unigram without bytes: unknown characters become one token, and EOS behind the text is left out."""
    tokens = tokenizer("unigram, EOS")
    row = encode(tokens, "The capital of {} is", "France", "Rome")
    pieces = tokens.convert_ids_to_tokens(list(row.ids))
    assert pieces[-1] == "▁Rome"
    assert tokens.eos_token_id not in row.ids
    assert decode(tokens, row.ids[: row.subject_last + 1]) == "The capital of France"
    row = encode(tokens, "I saw {} there", "🚀🚀", "ж")
    assert row.ids[row.subject_last] == tokens.unk_token_id


@pytest.mark.parametrize(
    ("kind", "carrier"), [("byte level", 0), ("byte level, BOS", 1), ("metaspace", 1), ("metaspace, no BOS", 0)]
)
def test_a_one_token_subject_at_the_start(kind: str, carrier: int) -> None:
    row = encode(tokenizer(kind), "{} is in", "The")
    assert tokenizer(kind).convert_ids_to_tokens(row.ids[carrier]).lstrip("▁") == "The"
    assert row.subject_last == carrier


def test_a_merge_across_the_subjects_end_carries_it() -> None:
    vocabulary = {sign: index for index, sign in enumerate(["a", "b", "c", "bc", "abc", "[EOS]"])}
    raw = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "bc")]))
    tokens = kinds._wrap(raw, None, "[EOS]", "[EOS]")
    assert encode(tokens, "a{}c", "b") == Encoded((4,), 0, 1)
    assert encode(tokens, "{}bc", "a") == Encoded((4,), 0, 1)
    # The target alone: 'c' behind 'ab' would have become part of the prompt's token
    assert encode_target(tokens, "a(", "bc") == (3,)


def test_a_merging_target_gets_no_space_from_sentencepiece() -> None:
    """By itself 'a' would be '▁a', with a space that is not meant behind a bracket."""
    words = ["▁", "x", "(", "a", ".", "▁x", "▁a", "(a", "[EOS]"]
    vocabulary = {word: index for index, word in enumerate(words)}
    raw = Tokenizer(models.BPE(vocabulary, [("▁", "x"), ("▁", "a"), ("(", "a")]))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokens = kinds._wrap(raw, None, "[EOS]", "[EOS]")
    assert tokens("a")["input_ids"] == [vocabulary["▁a"]]
    assert tokens("x (a")["input_ids"] == [vocabulary["▁x"], vocabulary["▁"], vocabulary["(a"]]
    row = encode(tokens, "{} (", "x", "a")
    assert [words[token] for token in row.ids] == ["▁x", "▁", "(", "a"]
    assert row.prompt_len == 3


def test_a_merge_across_the_targets_start_leaves_the_prompt_as_it_is() -> None:
    tokens = tokenizer("byte level, signs join words")
    for opening in ('He said "', "She lives in ("):
        alone = tokens(opening, add_special_tokens=False)["input_ids"]
        row = encode(tokens, "{} " + opening, "Zoë", "the sea")
        assert list(row.ids[row.prompt_len - 1 : row.prompt_len]) == alone[-1:]
        assert decode(tokens, row.ids[row.prompt_len :]) == "the sea"
        assert row.ids[row.prompt_len :] == encode_target(tokens, opening, "the sea")


def test_the_slots_subject_is_meant_not_an_equal_text_before_it() -> None:
    tokens = tokenizer("byte level")
    first = encode(tokens, "{} and Paris are", "Paris")
    second = encode(tokens, "Paris and {} are", "Paris")
    assert first.ids == second.ids
    assert decode(tokens, second.ids[: second.subject_last + 1]) == "Paris and Paris"
    assert first.subject_last < second.subject_last
    prefixed = encode(tokens, "{} is", "Paris", prefix="Paris is. ")
    assert decode(tokens, prefixed.ids[: prefixed.subject_last + 1]) == "Paris is. Paris"


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_space_at_the_prompts_end_makes_no_difference(kind: str) -> None:
    tokens = tokenizer(kind)
    assert encode(tokens, "{} is in ", "Rome ", " Paris ") == encode(tokens, "{} is in", "Rome", "Paris")
    assert encode_target(tokens, "in ", "Paris") == encode_target(tokens, "in", " Paris")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_target_is_the_same_behind_any_word(kind: str) -> None:
    tokens = tokenizer(kind)
    expected = encode_target(tokens, "The capital of France is", "Paris")
    row = encode(tokens, "The twin of {} is", "Rome", "Paris")
    assert row.ids[row.prompt_len :] == expected
    assert len(expected) >= 1


@pytest.mark.parametrize(
    ("text", "target", "between"),
    [
        ("is in", "Rome", " "),
        ("is in ", "Rome", ""),
        ('called "', "Rome", ""),
        ('who wrote "Rome"', "Rome", " "),
        ("it's Marcus'", "Rome", " "),
        ("(", "Rome", ""),
        ("he lives („", "Rom", ""),
        ("首都は", "東京", ""),
        ("首都は", "Tokyo", " "),
        ("the capital is", "東京", " "),
        ("首都は、", "東京", ""),
        ("เมืองหลวงคือ", "กรุงเทพ", ""),
        ("수도는", "서울", " "),
        ("Главный город", "Москва", " "),
        ("", "Rome", ""),
    ],
)
def test_what_stands_between_prompt_and_target(text: str, target: str, between: str) -> None:
    assert join(text, target) == between


def test_many_at_once_are_the_same_as_one_by_one_and_take_one_call() -> None:
    tokens = kinds.byte_level()
    items = records(50, seed=1)
    calls = []

    class Counted:
        is_fast = True

        def __call__(self, texts: Any, **options: Any) -> Any:
            calls.append(texts)
            return tokens(texts, **options)

    many = encode_many(Counted(), items)
    assert sum(isinstance(texts, list) and len(texts) > 2 for texts in calls) == 1
    assert many == [encode(tokens, *item) for item in items]
    assert encode_many(tokens, []) == []


def test_settings_left_by_others_do_not_matter() -> None:
    """A tokenizer remembers the padding and truncation of its last call, and of its file."""
    tokens = kinds.byte_level()
    expected = encode(tokens, "The mother tongue of {} is", "Danielle", "English")
    tokens(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    assert encode(tokens, "The mother tongue of {} is", "Danielle", "English") == expected


def test_a_normalizer_that_drops_the_last_character() -> None:
    raw = Tokenizer(models.WordLevel({"paris": 0, "is": 1, "rome": 2, "?": 3, "a": 4}, unk_token="?"))
    raw.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = kinds._wrap(raw, None, "?", "?")
    assert encode(tokens, "{} is", "Paris\u0301", "Rome") == Encoded((0, 1, 2), 0, 2)
    with pytest.raises(BadInput, match="keeps nothing of the subject"):
        encode(tokens, "{} is", "\u0301")
    with pytest.raises(BadInput, match="keeps nothing of the target"):
        encode(tokens, "{} is", "Paris", "\u0301")


def test_wrong_prompts_and_slow_tokenizers() -> None:
    tokens = tokenizer("byte level")
    for prompt in ("is", "{} {}"):
        with pytest.raises(BadInput, match="exactly one"):
            encode(tokens, prompt, "A")
    with pytest.raises(BadInput, match="empty"):
        encode(tokens, "{} is", "  ")

    class Slow:
        is_fast = False

    with pytest.raises(BadInput, match="slow tokenizer"):
        require_fast(Slow())
    with pytest.raises(BadInput, match="slow tokenizer"):
        encode(Slow(), "{} is", "A")


def test_targets_that_are_too_long_are_all_named() -> None:
    tokens = tokenizer("byte level")
    facts = [
        Fact("A", "{} is", "of of of", where="f.yaml:2:5"),
        Fact("B", "{} is", " ".join(["of"] * 50), where="f.yaml:3:5"),
        Fact("C", "{} is", " ".join(["of"] * 33), id="c"),
        Fact("D", "{} is", " ".join(["of"] * 32), id="d"),
    ]
    with pytest.raises(BadInput) as caught:
        check_lengths(tokens, facts)
    assert caught.value.message == "2 targets are longer than 32 tokens"
    assert [line.split(": ")[0] for line in caught.value.details] == ["f.yaml:3:5", "c"]
    assert caught.value.details[0].endswith("has 50 tokens")
    check_lengths(tokens, facts, limit=50)


def test_many_texts_are_tokenized_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = kinds.byte_level(), []

    class Counting:
        is_fast = True

        def __call__(self, texts: Any, **settings: Any) -> Any:
            seen.append(1 if isinstance(texts, str) else len(texts))
            return tokenizer(texts, **settings)

    items = [Item("{} is in", f"Tower {number}", "Rome") for number in range(11)]
    whole = encode_many(tokenizer, items)
    monkeypatch.setattr(tokens, "_AT_ONCE", 4)
    assert encode_many(Counting(), items) == whole
    assert max(seen) == 8, "a prompt, and the same with its target, of four rows"


def test_a_token_is_one_object_however_many_rows_have_it() -> None:
    rows = encode_many(kinds.byte_level(), [Item("{} is in", f"Tower {number}", "Rome") for number in range(50)])
    values = [token for row in rows for token in row.ids]
    assert len({id(token) for token in values}) == len(set(values))
