"""The Python API: docs/python.md names every function with its real parameters, and one patch is a list of one."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kpatch
from kpatch.edit.methods import with_settings
from kpatch.edit.presets import MemitHyper
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact, FactFile, facts_in
from kpatch.patch.header import read_header
from tests.support import checkpoints, cli
from tests.support.models import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
TABLE = [line for line in PAGE.splitlines() if line.startswith("| `")]
STATED = {
    call.partition("(")[0]: call for line in TABLE for call in re.findall(r"`(\w+\(.*?\))`", line.split(" | ")[0])
}


def stated(call: str) -> list[tuple[str, Any, bool]]:
    """Parameters as the page has them: name, default as text or None, whether by keyword only."""
    source = call.replace("=…", "=...")
    function = ast.parse(f"def {source}: pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    plain = [None] * (len(arguments.args) - len(arguments.defaults)) + [*arguments.defaults]
    rows = [(a.arg, d and ast.unparse(d), False) for a, d in zip(arguments.args, plain, strict=True)]
    return rows + [
        (a.arg, d and ast.unparse(d), True) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]


def real(function: Any) -> list[tuple[str, Any, bool]]:
    rows = []
    for name, one in inspect.signature(function).parameters.items():
        default = None if one.default is one.empty else "..." if name == "report" else repr(one.default)
        rows.append((name, default, one.kind is one.KEYWORD_ONLY))
    return rows


def test_names_are_imported_when_they_are_asked_for() -> None:
    assert set(kpatch.__all__) <= set(dir(kpatch))
    heavy = "print([name for name in ('torch', 'transformers', 'typer') if name in sys.modules])"
    assert cli.python(f"import sys, kpatch; kpatch.status; {heavy}") == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kpatch.nothing  # noqa: B018


def test_the_table_has_every_function() -> None:
    assert set(STATED) == set(kpatch.__all__) - {"__version__"}


@pytest.mark.parametrize("name", sorted(set(kpatch.__all__) - {"__version__"}))
def test_the_table_has_the_real_parameters(name: str) -> None:
    assert stated(STATED[name]) == real(getattr(kpatch, name))


FACT = Fact("Rome", "{} is in", "Spain")


@pytest.mark.parametrize("form", [tuple, list, iter, lambda facts: facts[0], FactFile])
def test_facts_are_given_in_any_of_these_forms(form: Any) -> None:
    assert facts_in(form((FACT,))) == (FACT,)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("facts.yaml", "is a text or a path"),
        (Path("facts.yaml"), "is a text or a path"),
        ([FACT, FACT.to_dict()], "holds a dict, not a Fact"),
        (3, "is a int, not facts"),
    ],
)
def test_what_is_no_facts_is_refused_by_what_it_is(given: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        kpatch.make(given, out=tmp_path / "x.patch", model="none/such")


@pytest.mark.parametrize("layers", [3, "1-2", ["1"], [1.0]])
def test_layers_are_a_list_of_whole_numbers(layers: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="`layers` is"):
        kpatch.make([FACT], out=tmp_path / "x.patch", model="none/such", layers=layers)


def test_a_setting_that_is_nothing_is_no_number() -> None:
    with pytest.raises(BadInput, match="steps=None is not a whole number"):
        with_settings(MemitHyper((1,)), {"steps": None})  # type: ignore[dict-item]


def test_a_models_address_may_be_a_path_and_nothing_else_but_text(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a model directory"):
        kpatch.load_model(tmp_path)
    with pytest.raises(BadInput, match="`model` is a dict, not a model's address"):
        kpatch.load_model({})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call", [kpatch.ask, kpatch.answer_questions, kpatch.evaluate_facts, kpatch.probe_facts, kpatch.trace_facts]
)
def test_an_address_is_no_loaded_model(call: Any) -> None:
    with pytest.raises(BadInput, match="`model` is a str, not a loaded Model"):
        call("smollm2", [FACT])


def test_numbers_and_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, patch = tiny("llama"), tmp_path / "a.patch"
    checkpoints.make_patch(patch, checkpoints.make_checkpoint(tmp_path / "model"))
    with pytest.raises(BadInput, match="`top=-1` is less than 0"):
        kpatch.ask(model, "The sea", top=-1)
    with pytest.raises(BadInput, match="`scales` holds '1', which is no number"):
        kpatch.stack(patch, scales=["1"])
    with pytest.raises(BadInput, match="`questions` holds a str, not a Question"):
        kpatch.answer_questions(model, ["Who?"])  # type: ignore[list-item]
    with pytest.raises(BadInput, match="`objects` has 0 lists"):
        kpatch.probe_facts(model, [FACT], objects=[])


@pytest.mark.parametrize("memory", [-1, 0, 0.5, float("nan"), float("inf"), "2GB", True], ids=str)
def test_memory_is_a_number_of_bytes(memory: Any, tmp_path: Path) -> None:
    model, patch = tiny("llama"), tmp_path / "a.patch"
    checkpoints.make_patch(patch, checkpoints.make_checkpoint(tmp_path / "model"))
    out = tmp_path / "out.patch"
    calls: dict[str, Callable[[], object]] = {
        "memory": lambda: kpatch.make([FACT], out=out, model=model, memory=memory),
        "again": lambda: kpatch.stack_resolved(patch, out, model=model, memory=memory),
        "tune": lambda: kpatch.tune_settings(model, memory=memory),
        "trace": lambda: kpatch.trace_facts(model, [FACT], budget=memory),
        "train": lambda: kpatch.train_editor(model, [FACT], out, memory=memory),
    }
    for name, call in calls.items():
        with pytest.raises(BadInput, match=f"`{'budget' if name == 'trace' else 'memory'}={memory}` is no number of"):
            call()
    assert not out.exists()


def test_questions_of_a_file_are_answered(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "Where is Rome?", "answers": ["Italy"]}\n', encoding="utf-8")
    model, file = tiny("llama"), kpatch.load_questions(path)
    answered = kpatch.answer_questions(model, file, tokens=3)
    assert answered == kpatch.answer_questions(model, file.questions, "completion", 3)
    assert (len(answered), answered[0].exact) == (1, False)


def test_one_prompt_is_a_list_of_one() -> None:
    model = tiny("llama")
    assert kpatch.ask(model, "The sea", max_tokens=2) == kpatch.ask(model, ["The sea"], max_tokens=2)


@pytest.mark.parametrize("prompts", [None, 3, [3], {"The sea"}], ids=str)
def test_prompts_are_texts(prompts: Any) -> None:
    with pytest.raises(BadInput, match="`prompts` is no text and no list of texts"):
        kpatch.ask(tiny("llama"), prompts)


def test_a_fact_file_has_a_path() -> None:
    with pytest.raises(BadInput, match="`path` is a bytes"):
        kpatch.load_facts(b"facts.yaml")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["text", "path", "info", "patch"])
def test_one_patch_is_a_list_of_one(form: str, tmp_path: Path) -> None:
    model = checkpoints.make_checkpoint(tmp_path / "model")
    file = tmp_path / "a.patch"
    checkpoints.make_patch(file, model)
    forms = {"text": str, "path": Path, "info": read_header, "patch": kpatch.read_patch}
    patch = forms[form](file)
    assert kpatch.stack(patch).patches[0].id == read_header(file).id
    assert [one["name"] for one in kpatch.apply(patch, model).patches] == ["a"]
    assert [one["name"] for one in kpatch.revert(model, patch).patches] == ["a"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"settings": ["steps=2"]}, "`settings` is a list"),
        ({"tokens": "200"}, "`tokens` is '200', a str"),
        ({"seed": "x"}, "`seed` is 'x', a str"),
        ({"seed": True}, "`seed` is True, a bool"),
        ({"corpus": 5}, "`corpus` is a int, not a path"),
        ({"out": None}, "`out` is a NoneType, not a path"),
    ],
    ids=str,
)
def test_arguments_of_another_kind_are_refused_before_any_work(given: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        kpatch.make([Fact("A", "{} is", "B")], **{"out": tmp_path / "a.patch", "model": "no/model", **given})


@pytest.mark.parametrize("name", ["top", "max_tokens"])
def test_how_many_tokens_is_a_number(name: str) -> None:
    with pytest.raises(BadInput, match=f"`{name}` is '3', a str"):
        kpatch.ask(tiny("llama"), "A", **{name: "3"})  # type: ignore[arg-type]


def test_a_bare_tensor_is_no_change_of_a_weight() -> None:
    model = tiny("llama")
    name, before = model.weight_name(1), model.weight(1).clone()
    with pytest.raises(BadInput, match=f"The change of {name} is a Tensor"), kpatch.patched(model, {name: before}):
        pass
    assert model.weight(1).equal(before)
