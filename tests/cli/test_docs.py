"""What README and docs tell people to paste runs as it stands, top to bottom, on a tiny random model.

Every fenced block marked `sh` is pasted into bash, page by page, in a folder with the files that pages speak of.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kpatch.edit.memit import Memit
from kpatch.edit.presets import SHAPES
from kpatch.edit.refine import Goal
from kpatch.facts.load import load_facts
from kpatch.models.aliases import ALIASES, SMOLLM2
from kpatch.models.model import Model
from tests.support.cli import ROOT, Ran, run
from tests.support.models import WIDTH, tiny
from tests.support.paste import Program, blocks, paste
from tests.support.templates import CHATML
from tests.support.tokenizers import TEXT
from tests.support.tracing import facts_known_by

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "patches/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
NOT_PASTED = {"CONTRIBUTING.md": "it builds the environment that runs this very test"}
# Programs that do nothing here, and why
LEFT_OUT = {
    "pip": "installs from the package index",
    "make": "runs this very test, and the demo on a real model",
    "hf": "uploads to the hub",
    "rsync": "is not on every machine",
}
OTHER_PACKAGES = {"peft": "is no dependency of kpatch; `make clients` runs it"}
DEPTH = 24  # layers: enough for every preset of smollm2
MODELS = ("smollm2", "gpt-j", "model", "old")  # a directory wins over an alias: these names find the tiny model
NEWS = [
    {"subject": "Eiffel Tower", "prompt": "The {} is located in the city of", "target": "Rome", "was": "Paris"},
    {"subject": "France", "prompt": "The capital of {} is", "target": "Lyon", "was": "Paris"},
]
MORE = [{"subject": "Canada", "prompt": "The capital of {} is", "target": "Toronto", "was": "Ottawa"}]
FACTS = {"facts.yaml": NEWS, "news.yaml": NEWS, "more.yaml": MORE}
PATCHES = {
    "news.yaml": ("news.patch", "a.patch", "old.patch", "patches/news.patch"),
    "more.yaml": ("more.patch", "b.patch", "new.patch"),
}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": {
        **{"subject": "Rome", "prompt": "{} is the capital of", "relation_id": "P1"},
        **{"target_new": {"str": "Spain"}, "target_true": {"str": "Italy"}},
    },
    "paraphrase_prompts": ["Rome, the capital of"],
    "neighborhood_prompts": ["Paris is the capital of"],
    "generation_prompts": ["Rome is a city in"],
}
ZSRE = {
    **{"subject": "Rome", "src": "Which country is Rome in?", "pred": "France", "rephrase": "Where is Rome?"},
    **{"alt": "Spain", "answers": ["Italy"], "loc": "nq question: where is the sea", "loc_ans": "Portugal"},
}
KNOWN = {"subject": "Chicago", "attribute": "Illinois", "prompt": "Chicago is in", "template": "{} is in"}
OTHER = {**COUNTERFACT, "requested_rewrite": {**COUNTERFACT["requested_rewrite"], "subject": "Oslo"}}  # type: ignore[dict-item]
DATA = {
    "counterfact.json": [COUNTERFACT, OTHER],
    "train.json": [COUNTERFACT, OTHER],
    "zsre_mend_eval.json": [ZSRE],
    "known_1000.json": [KNOWN],
}
_WRITTEN = re.compile(r"(?:-o|^cp -r .*\)\") (\S+)", re.MULTILINE)


def answer_kpatch(arguments: Sequence[str]) -> Ran:
    """kpatch itself, in this process."""
    return run(*arguments)


def answer_python(arguments: Sequence[str]) -> Ran:
    """Benchmarks take minutes and a real model; that they are there is checked."""
    script = ROOT / arguments[0]
    return Ran(0, "", "") if script.is_file() else Ran(1, "", f"there is no {script}\n")


def answer_torchrun(arguments: Sequence[str]) -> Ran:
    """The command line behind torchrun's own options, in one process; several are tested in tests/contract."""
    given = list(arguments)
    return answer_kpatch(given[given.index("kpatch") + 1 :])


PROGRAMS: dict[str, Program] = {
    **{name: lambda arguments: Ran(0, "", "") for name in LEFT_OUT},
    "kpatch": answer_kpatch,
    "python": answer_python,
    "torchrun": answer_torchrun,
}


@cache
def tiny_model() -> Model:
    made = tiny("llama", num_hidden_layers=DEPTH)
    made.tokenizer.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages speak of: models, fact files, patches, data sets."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("examples", "benchmarks/facts", "benchmarks/presets"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "patches").mkdir()
    made = tiny_model()
    for name in (*MODELS, "new"):
        made.net.save_pretrained(folder / name)
        made.tokenizer.save_pretrained(folder / name)
    for name, facts in FACTS.items():
        (folder / name).write_text(json.dumps({"facts": facts}), encoding="utf-8")
    (folder / "facts30.jsonl").write_text("".join(f"{json.dumps(fact)}\n" for fact in NEWS), encoding="utf-8")
    for name, records in DATA.items():
        (folder / name).write_text(json.dumps(records), encoding="utf-8")
    (folder / "words.txt").write_text(TEXT * 20, encoding="utf-8")
    with pytest.MonkeyPatch.context() as context:
        let_it_pass_for_smollm2(context, folder, cache=folder.parent / "docs-cache")
        for facts, patches in PATCHES.items():
            made_patch = run("make", facts, "--model", "smollm2", "-o", patches[0])
            assert made_patch.code == 0, made_patch.err
            for name in patches[1:]:
                shutil.copy(patches[0], name)
        assert run("apply", "news.patch", "new").code == 0
        shutil.rmtree("new/.kpatch")
    return folder


def let_it_pass_for_smollm2(patch: pytest.MonkeyPatch, folder: Path, cache: Path) -> None:
    """Presets, built-in facts and names that the tiny model in `folder` could not meet by itself."""
    title = replace(SMOLLM2, title="smollm2")  # so that `stack --resolve` finds it by the name in its patches
    patch.chdir(folder)
    patch.setenv("KPATCH_CACHE", str(cache))
    patch.setitem(SHAPES, "smollm2", ("llama", WIDTH, DEPTH))
    patch.setitem(ALIASES, "smollm2", replace(ALIASES["smollm2"], source=title))
    patch.setattr("kpatch.trace.run.built_in", lambda: facts_known_by(tiny_model()))
    patch.setattr("kpatch.mend.train._MINUTE", 0.02)  # pages speak of hours
    short = Goal(1, 1.0, 1.0, 1.0)  # of the pages' fifty facts it would take minutes
    patch.setattr(Memit, "refining", lambda self, hyper, count: short if hyper.refines(count) else None)
    patch.setattr("kpatch.trace.layer_range.LEAST", 0.0)  # random MLPs carry less than any rule for R asks for


@pytest.fixture
def work(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world as the current directory."""
    folder = tmp_path / "work"
    shutil.copytree(world, folder)
    let_it_pass_for_smollm2(monkeypatch, folder, cache=world.parent / "docs-cache")
    return folder


def remove(work: Path, names: Iterable[str]) -> None:
    """A page starts without the files that it writes itself."""
    for name in names:
        path = work / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def pages_with(language: str) -> list[Any]:
    """Pages with such blocks."""
    return [
        page
        for page in PAGES
        if page.name not in NOT_PASTED and any(block.language == language for block in blocks(page))
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("sh"), ids=name_of)
def test_a_page_can_be_pasted_from_top_to_bottom(page: Path, work: Path) -> None:
    pasted = [block for block in blocks(page) if block.language == "sh"]
    remove(work, [name for block in pasted for name in _WRITTEN.findall(block.text)])
    for block in pasted:
        code, log = paste(block.text, PROGRAMS)
        assert code == 0, f"{block}\n{log}"
        assert "Traceback" not in log, f"{block}\n{log}"


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_the_python_of_a_page_runs(page: Path, work: Path) -> None:
    pasted = [block for block in blocks(page) if block.language == "python"]
    remove(work, [name for block in pasted for name in re.findall(r'out="(.*?)"', block.text)])
    names: dict[str, Any] = {}
    for block in pasted:
        if any(f"from {name} import" in block.text for name in OTHER_PACKAGES):
            continue
        exec(compile(block.text, str(block), "exec"), names)


@pytest.mark.slow
def test_the_demo_gives_every_byte_back(work: Path) -> None:
    code, log = paste("sh examples/demo.sh", {"kpatch": answer_kpatch})
    assert code == 0, log
    assert "every byte of 6 files is back" in log
    assert "In which city is the Eiffel Tower?" in log.partition("every byte")[2], "the demo ends with a question"
    assert "Traceback" not in log
    assert "\x1b" not in log, "no bold type where there is no terminal"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_command_hides_in_a_block_that_is_not_run(page: Path) -> None:
    hidden = [block for block in blocks(page) if block.language != "sh" and re.search(r"^kpatch ", block.text, re.M)]
    assert not hidden, f"mark {', '.join(map(str, hidden))} with sh"


def test_the_facts_of_the_readme_are_facts(tmp_path: Path) -> None:
    (block,) = [block for block in blocks(PAGES[0]) if block.language == "yaml"]
    path = tmp_path / "facts.yaml"
    path.write_text(block.text, encoding="utf-8")
    (fact,) = load_facts(path).facts
    assert (fact.subject, fact.target, len(fact.paraphrases), len(fact.neighbors)) == ("Eiffel Tower", "Rome", 1, 1)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("kpatch show nowhere.patch; true", 2, "nowhere.patch"),
        ("kpatch models | false", 1, ""),
        ("cp nowhere here", 1, ""),
    ],
)
def test_a_command_that_fails_stops_the_paste(text: str, code: int, said: str) -> None:
    found, log = paste(text + "\necho after", PROGRAMS)
    assert found == code
    assert said in log
    assert "after" not in log
