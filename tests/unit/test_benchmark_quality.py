"""The judge beside kpatch: its numbers on a tiny model against plain forward passes, and the forms that it reads."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from kpatch.evaluate.metrics import measure
from kpatch.facts.load import load_facts
from kpatch.models.model import Model
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("shared_statistics")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FACTS = """
version: 1
relations:
  landmark:
    prompt: "The {} stands in"
    question: "Where is the {}?"
    paraphrases: ["To see the {} people travel all the way to the city of"]
    neighbors: ["The Colosseum stands in -> Rome", "The Louvre stands in -> Paris"]
facts:
  - subject: Eiffel Tower
    relation: landmark
    target: Rome
    was: Paris
    paraphrases: ["{} is in"]
    neighbors: [{prompt: "One sees the Arch in", target: No}, {prompt: "The mill is in"}]
  - {subject: Colosseum, relation: landmark, target: the old town, was: Rome}
  - "[Chicago] lies in -> Brazil"
"""


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quality")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    torch.set_num_threads(1)
    made, path = tiny("llama"), tmp_path_factory.mktemp("judged") / "model"
    made.tokenizer.chat_template = "{% for message in messages %}Q: {{ message['content'] }}\nA: {% endfor %}"
    # Settings that would change what is written
    made.net.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    made.net.save_pretrained(path)
    made.tokenizer.save_pretrained(path)
    (path.parent / "facts.yaml").write_text(FACTS, encoding="utf-8")
    (path.parent / "text.txt").write_text("The sea is cold in winter. " * 150, encoding="utf-8")
    return made, path


def _report(quality: ModuleType, path: Path, *options: str) -> dict[str, Any]:
    out = path.parent / "out.json"
    quality.main([str(path), str(path.parent / "facts.yaml"), "--json", str(out), *options])
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@torch.no_grad()
def _by_hand(model: Model, prompt: str, answer: str) -> float:
    """Mean log-probability of an answer's tokens, one row, no padding."""
    before = model.tokenizer(prompt)["input_ids"]
    wanted = model.tokenizer(" " + answer)["input_ids"]
    logprobs = model.net(torch.tensor([before + wanted])).logits[0].log_softmax(-1)
    return sum(logprobs[len(before) - 1 + i, token].item() for i, token in enumerate(wanted)) / len(wanted)


@torch.no_grad()
def _written(model: Model, prompt: str, count: int) -> str:
    ids = model.tokenizer(prompt)["input_ids"]
    begin = len(ids)
    while len(ids) < begin + count:
        token = int(model.net(torch.tensor([ids])).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        ids.append(token)
    return str(model.tokenizer.decode(ids[begin:], skip_special_tokens=True))


def test_numbers_by_hand(
    quality: ModuleType, model: tuple[Model, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = model
    monkeypatch.setattr(quality, "ROWS", 3)  # several batches, rows of several lengths
    found = _report(quality, path, "--chat", "--intervals", "--text", str(path.parent / "text.txt"))
    metrics = found["metrics"]
    assert found["facts"] == 3
    assert found["asked"] == {"edit": 3, "paraphrase": 3, "neighbor": 4, "chat edit": 2, "chat neighbor": 3}

    travel = "To see the {} people travel all the way to the city of"
    paraphrases = [
        ("Eiffel Tower is in", "Rome", "Paris"),
        (travel.format("Eiffel Tower"), "Rome", "Paris"),
        (travel.format("Colosseum"), "the old town", "Rome"),
    ]
    # Each neighbor of the relation counts for the fact that it is not about; the one without an answer for none
    neighbors = [
        ("One sees the Arch in", "No", "Rome"),
        ("The Colosseum stands in", "Rome", "Rome"),  # its own rival: not compared
        ("The Louvre stands in", "Paris", "Rome"),
        ("The Louvre stands in", "Paris", "the old town"),
    ]
    for columns, asked in (("PL PS", paraphrases), ("NL NS", neighbors)):
        of_answers, success = columns.split()
        right = [_by_hand(made, prompt, answer) for prompt, answer, _ in asked]
        rival = [_by_hand(made, prompt, answer) for prompt, _, answer in asked]
        assert metrics[of_answers] == pytest.approx(sum(right) / len(right), abs=1e-5)
        compared = [one > other for one, other, (_, a, b) in zip(right, rival, asked, strict=True) if a != b]
        assert metrics[success] == sum(compared) / len(compared)

    written = {"paraphrase": 12, "neighbor": 8, "chat edit": 16, "chat neighbor": 16}
    for question in found["questions"]:
        if count := written.get(question["kind"]):
            chat = question["kind"].startswith("chat")
            prompt = f"Q: {question['prompt']}\nA: " if chat else question["prompt"]
            assert question["wrote"] == _written(made, prompt, count)
    chat = [q["prompt"] for q in found["questions"] if q["kind"].startswith("chat")]
    assert chat[0] == "Where is the Eiffel Tower?"
    assert "Where is the Louvre?" in chat

    ids = made.tokenizer((path.parent / "text.txt").read_text())["input_ids"]
    total, count = 0.0, 0
    for begin in range(0, len(ids), 512):
        row = torch.tensor([ids[begin : begin + 512]])
        with torch.no_grad():
            logprobs = made.net(row).logits[0, :-1].log_softmax(-1)
        total -= logprobs.gather(1, row[0, 1:, None]).sum().item()
        count += row.shape[1] - 1
    assert count > 512, "more than one window"
    assert metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| ES | PS | NS | EA | PA | NA | Score | PL | NL | PF | NF | CE | CN | perplexity |")
    assert f"{metrics['PL']:.2f}".replace("-", "−") in lines[2]
    assert " to " in lines[3]


def test_it_agrees_with_kpatch(quality: ModuleType, model: tuple[Model, Path]) -> None:
    made, path = model
    facts = path.parent / "facts.yaml"
    text = facts.read_text(encoding="utf-8").replace('    question: "Where is the {}?"\n', "")
    (path.parent / "plain.yaml").write_text(text, encoding="utf-8")
    kpatch = measure(made, load_facts(path.parent / "plain.yaml").facts).metrics
    metrics = _report(quality, path)["metrics"]
    for columns, name in (("ES EA", "efficacy"), ("PS PA", "generalization"), ("NS NA", "specificity")):
        success, greedy = columns.split()
        assert metrics[success] == kpatch[name]["success"]
        assert metrics[greedy] == kpatch[name]["accuracy"]
    assert metrics["Score"] == pytest.approx(kpatch["score"])
    assert metrics["CE"] is None, "only asked with --chat"


def test_what_the_model_writes_counts(quality: ModuleType, model: tuple[Model, Path]) -> None:
    made, path = model
    judge = quality.Judge.load(path)
    wrote = _written(made, "The mill is in", 12)
    word = max(re.findall(r"\w+", wrote), key=len)
    asked = [quality.Question(0, "paraphrase", "The mill is in", answer) for answer in (word, word + "x")]
    judge.write(asked, 12)
    assert [question.said for question in asked] == [True, False]
    assert quality.stands_in("the United States", "the UNITED states.")
    assert not quality.stands_in("Rome", "Romeo")


@torch.no_grad()
def test_greedy_is_every_token(quality: ModuleType, model: tuple[Model, Path]) -> None:
    made, path = model
    prompt = tuple(made.tokenizer("The mill is in")["input_ids"])
    first = int(made.net(torch.tensor([prompt])).logits[0, -1].argmax())
    second, last = made.net(torch.tensor([[*prompt, first]])).logits[0, -1].topk(2).indices.tolist()
    judge = quality.Judge.load(path)
    items = [(prompt, (first,)), (prompt, (first, second)), (prompt, (first, last)), (prompt, (last, second))]
    assert len(quality._rows(set(items))) == 2, "what begins alike is run once"
    judge._run(set(items))
    assert [judge._scored[item][1] for item in items] == [True, True, False, first == last]


def test_intervals_draw_facts(quality: ModuleType) -> None:
    def fact(number: int, success: bool) -> list[Any]:
        return [quality.Question(number, "edit", "", "", success=success)] * 4

    all_right = quality.intervals([fact(0, True), fact(1, True)])
    assert all_right["ES"] == [1.0, 1.0]
    assert all_right["PS"] is None
    # Two facts that differ: a quarter of the samples has one of them alone, however many questions they have
    assert quality.intervals([fact(0, True), fact(1, False)])["ES"] == [0.0, 1.0]


FLAT = {
    **{"prompt": "The Eiffel Tower stands in", "subject": "Eiffel Tower", "target_new": "Rome"},
    **{"ground_truth": "Paris", "rephrase_prompt": "Wind. Eiffel Tower is in"},
    **{"locality_prompt": "The Louvre stands in", "locality_ground_truth": "Paris"},
}
NESTED = {
    "requested_rewrite": {
        **{"prompt": "The {} stands in", "subject": "Eiffel Tower"},
        **{"target_new": {"str": "Rome"}, "target_true": {"str": "Paris"}},
    },
    "paraphrase_prompts": ["Wind. Eiffel Tower is in"],
    "neighborhood_prompts": ["The Louvre stands in"],
}


@pytest.mark.parametrize("record", [FLAT, NESTED])
def test_counterfact(quality: ModuleType, tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([{}, record, record]), encoding="utf-8")
    (questions,) = quality.read(path, start=1, limit=1)
    assert [(q.kind, q.prompt, q.right, q.rival) for q in questions] == [
        ("edit", "The Eiffel Tower stands in", "Rome", "Paris"),
        ("paraphrase", "Wind. Eiffel Tower is in", "Rome", "Paris"),
        ("neighbor", "The Louvre stands in", "Paris", "Rome"),
    ]
    with pytest.raises(ValueError, match="fact 0 is of an unknown form"):
        quality.read(path)
    with pytest.raises(ValueError, match="it holds 3"):
        quality.read(path, start=3)


def test_questions_of_another_file(quality: ModuleType, model: tuple[Model, Path], tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(FACTS.replace("Where is the {}?", "What city has the {}?"), encoding="utf-8")
    other = quality.questions_of(tmp_path / "other.yaml")
    first = quality.read(model[1].parent / "facts.yaml", other=other)[0]
    assert [q.prompt for q in first if q.kind == "chat edit"] == ["What city has the Eiffel Tower?"]


def test_it_is_a_judge_of_its_own() -> None:
    for path in sorted(BENCHMARKS.glob("quality*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "kpatch"], path.name


def test_the_two_sets_of_facts_are_apart() -> None:
    texts = [(BENCHMARKS / "facts" / name).read_text(encoding="utf-8") for name in ("tuning.yaml", "held_out.yaml")]
    sets = [yaml.safe_load(text) for text in texts]
    subjects = [{fact["subject"] for fact in data["facts"]} for data in sets]
    assert not subjects[0] & subjects[1]
    assert [len(data["facts"]) for data in sets] == [50, 50]
    assert sets[0]["relations"].keys() == sets[1]["relations"].keys()
