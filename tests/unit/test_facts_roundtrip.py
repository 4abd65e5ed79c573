"""What write_facts writes, load_facts reads back: the same facts, whatever is in them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpatch.facts.fact import Fact, Neighbor
from kpatch.facts.importers.read import import_facts
from kpatch.facts.join import trimmed
from kpatch.facts.load import load_facts
from kpatch.facts.write import write_facts

# Everything but control characters, lone halves of characters and the subject's slot
_SIGNS = st.characters(exclude_categories=("Cc", "Cs")) | st.sampled_from("\n\t'\"#:-&*!|>%@`[]{}?,\\<$ ")
_ANY = st.text(_SIGNS, min_size=1, max_size=12).filter(lambda text: "{}" not in text and text.strip() != "")
_WORDS = st.sampled_from(
    ["no", "~", "1984", "<<", "*a", "&a b", "null", "2024-01-01", "0x1", "- a", "a: b", "a #b", "=", "!t"]
)
_TEXT = (_WORDS | _ANY).map(str.strip).filter(bool)
_ASKED = _ANY.map(trimmed)


@st.composite
def _facts(draw: st.DrawFn) -> Fact:
    before, behind = draw(st.just("") | _ANY), draw(st.just("") | _ANY)
    prompt = trimmed(before + "{}" + behind)
    return Fact(
        subject=draw(_TEXT),
        prompt=prompt if prompt.count("{}") == 1 else "{}",
        target=draw(_TEXT),
        was=draw(st.none() | _TEXT),
        paraphrases=tuple(dict.fromkeys(draw(st.lists(_ASKED, max_size=2)))),
        neighbors=tuple(Neighbor(prompt, draw(st.none() | _TEXT)) for prompt in draw(st.lists(_ASKED, max_size=2))),
        id=draw(_TEXT),
        source=draw(st.none() | _TEXT),
        space=draw(st.none() | st.booleans()),
        openings=tuple(draw(st.lists(_ASKED, max_size=1))),
        references=tuple(draw(st.lists(_TEXT, max_size=1))),
        negated=draw(st.none() | _ASKED),
        reversed=draw(st.none() | _ASKED),
        hops=tuple(Neighbor(prompt, draw(_TEXT)) for prompt in draw(st.lists(_ASKED, max_size=1))),
        choices=tuple(draw(st.lists(_TEXT, max_size=2))),
        yes_question=draw(st.none() | _TEXT),
        no_question=draw(st.none() | _TEXT),
        same_subject=tuple(draw(st.lists(_ASKED, max_size=1))),
    )


@settings(max_examples=3 * settings.default.max_examples // 2)
@given(_facts(), st.none() | _TEXT)
@pytest.mark.parametrize("suffix", [".yaml", ".jsonl"])
def test_facts_that_are_written_are_read_back(suffix: str, fact: Fact, model: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"facts{suffix}"
        write_facts(path, [fact], model)
        file = load_facts(path)
        assert file.facts == (fact,)
        assert file.model == (model if suffix == ".yaml" else None)
        again = Path(folder) / f"again{suffix}"
        write_facts(again, import_facts(path).facts, model)
        assert again.read_bytes() == path.read_bytes()


def test_the_flat_form_keeps_the_space(tmp_path: Path) -> None:
    facts = [Fact("Ann", "{} is anti", "body", space=False, id="a"), Fact("Bo", "{} costs (", "x", space=True, id="b")]
    write_facts(tmp_path / "facts.json", facts)
    assert import_facts(tmp_path / "facts.json").facts == tuple(facts)
