"""Subjects that a fact file protects: read, held, named in the patch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kpatch.edit.make import make
from kpatch.edit.protect import protected_keys
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact, FactFile, Protected
from kpatch.facts.load import load_facts
from kpatch.facts.tokens import encode
from kpatch.patch.format import read_patch
from kpatch.patch.stack import stack
from tests.oracle import memit as oracle
from tests.support.cli import run
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("shared_statistics")

FACTS = (Fact("Mona Lisa", "In the {}", "Paris"),)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def written(tmp_path: Path, protect: str) -> Path:
    path = tmp_path / "facts.yaml"
    path.write_text(f'protect: {protect}\nfacts:\n- "In the [Mona Lisa] -> Paris"\n', encoding="utf-8")
    return path


def test_a_file_names_subjects_with_prompt_and_weight(tmp_path: Path) -> None:
    file = load_facts(written(tmp_path, '[Chicago, {subject: Big Ben, prompt: "By {} is", weight: 2.5}]'))
    assert file.protect == (Protected("Chicago"), Protected("Big Ben", "By {} is", 2.5))
    assert load_facts(written(tmp_path, "")).protect == ()


@pytest.mark.parametrize(
    ("protect", "said"),
    [
        ("Chicago", "expected a list of subjects"),
        ("[{prompt: 'By {}'}]", "'subject' is missing"),
        ("[{subject: A, weight: 0}]", "expected a number above 0"),
        ("[{subject: A, weight: much}]", "expected a number above 0"),
        ("[{subject: A, prompt: By A}]", "no {}"),
        ("[{subject: A, wieght: 1}]", "did you mean"),
        ("[[A]]", "expected a subject"),
        ("[Mona  Lisa]", "is edited by a fact"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, protect: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        load_facts(written(tmp_path, protect))
    assert said in "\n".join([error.value.message, *error.value.details])


def test_keys_are_those_of_the_subject_in_its_prompt_or_in_those_of_the_facts() -> None:
    model = tiny("llama")
    facts = [*FACTS, Fact("Brazil", "{} is in", "Rome", wordings=("By the {} lies",))]
    keys = protected_keys(model, [Protected("Big Ben", "At {} is", 4.0), Protected("Moonlight")], facts, [1, 2])
    prompts = [("At {} is", "Big Ben", 4.0)]
    own = [text for text in ("In the {}", "{} is in", "By the {} lies")]
    inside = [text for text in own if encode(model.tokenizer, text, "Moonlight").subject_last > 0]
    prompts += [(text, "Moonlight", 1 / len(inside)) for text in inside]
    for layer, columns in keys.items():
        want = [
            oracle.key(model, encode(model.tokenizer, prompt, subject), layer).double() * weight**0.5
            for prompt, subject, weight in prompts
        ]
        torch.testing.assert_close(columns, torch.stack(want, dim=1), rtol=1e-4, atol=1e-6)
    assert protected_keys(model, [], facts, [1]) == {}


def test_a_subject_that_opens_its_text_is_refused() -> None:
    with pytest.raises(BadInput, match="the first token of a text"):
        protected_keys(tiny("llama"), [Protected("The", "{} is")], FACTS, [1])


def test_a_protected_subject_is_moved_less_and_named_in_the_patch(tmp_path: Path) -> None:
    model = tiny("llama")
    for saved in (model.net, model.tokenizer):
        saved.save_pretrained(tmp_path / "model")
    row = encode(model.tokenizer, "In the {}", "Mona Nisa")
    moved = {}
    for name, protect in (("free", ()), ("held", (Protected("Mona Nisa", weight=1e4),))):
        make(
            FactFile(FACTS, protect=protect),
            out=tmp_path / f"{name}.patch",
            model=str(tmp_path / "model"),
            layers=[1],
            tokens=400,
            settings={"steps": "4", "leverage": "500"},
        )
        patch = read_patch(tmp_path / f"{name}.patch")
        assert [dict(one) for one in patch.manifest.protect] == [one.to_dict() for one in protect]
        (delta,) = patch.deltas.values()
        moved[name] = float((delta.dense().double() @ oracle.key(model, row, 1).double()).norm())
    assert moved["held"] < 0.2 * moved["free"]
    assert "Mona Nisa" in run("show", tmp_path / "held.patch").out


def test_a_stack_holds_what_its_patches_hold(tmp_path: Path) -> None:
    model = tiny("llama")
    for saved in (model.net, model.tokenizer):
        saved.save_pretrained(tmp_path / "model")
    for name, fact in (("a", FACTS[0]), ("b", Fact("Brazil", "To {} we", "Rome"))):
        make(
            FactFile((fact,), protect=(Protected("Chicago"), Protected(name.upper(), "By {} is"))),
            out=tmp_path / f"{name}.patch",
            model=str(tmp_path / "model"),
            layers=[1],
            tokens=400,
            settings={"steps": "2"},
        )
    stack([tmp_path / "a.patch", tmp_path / "b.patch"], tmp_path / "ab.patch")
    held = [one["subject"] for one in read_patch(tmp_path / "ab.patch").manifest.protect]
    assert held == ["Chicago", "A", "B"]
