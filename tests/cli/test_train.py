"""`train mend` from the outside, and what `make`, `show`, `apply`, `revert` and `export` do with its editor."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from safetensors.torch import load_file

import kpatch
from kpatch.edit.methods import with_settings
from kpatch.errors import Refused
from kpatch.mend.settings import TrainHyper
from kpatch.patch.format import read_patch
from tests.support.checkpoints import snapshot
from tests.support.cli import run
from tests.support.editors import QUICK, training_facts
from tests.support.saved import save_facts, save_model

pytestmark = pytest.mark.usefixtures("shared_statistics")

SETTINGS = [
    word
    for key, value in QUICK.to_dict().items()
    if key in ("rank", "batch", "validate_every", "learning_rate", "step_rate", "edit_rate", "text_tokens", "measured")
    for word in ("--set", f"{key}={value}")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_facts(tmp_path / "data.yaml", [fact.to_dict() for fact in training_facts()])


def test_an_editor_from_training_to_an_adapter(model: Path, data: Path, tmp_path: Path) -> None:
    editor, patch = tmp_path / "mend.safetensors", tmp_path / "a.patch"
    done = run("train", "mend", model, data, "-o", editor, "--json", "--set", "steps=10", *SETTINGS)
    assert done.code == 0, done.err
    told = done.json
    assert (told["steps"], told["layers"], told["editor"]) == (10, [1, 2, 3], str(editor))
    assert told["ended"] == "all 10 steps were taken"
    assert told["facts"] == {"training": 11, "validation": 1}
    assert [row["step"] for row in told["validation"]] == [0, 10]
    assert told["sha256"] == hashlib.sha256(editor.read_bytes()).hexdigest()
    again = run("train", "mend", model, data, "-o", tmp_path / "b.safetensors", "--set", "steps=10", *SETTINGS)
    assert again.code == 0, again.err
    assert (tmp_path / "b.safetensors").read_bytes() == editor.read_bytes(), "the same inputs give the same file"
    numbers = {"steps": "10", **dict(word.split("=") for word in SETTINGS[1::2])}
    hyper = with_settings(TrainHyper(), numbers)
    out = tmp_path / "c.safetensors"
    made = kpatch.train_editor(kpatch.load_model(str(model)), training_facts(), out, settings=hyper)
    assert (made.path, made.sha256, made.trained.steps) == (out, told["sha256"], 10)
    with pytest.raises(Refused, match="exists"):
        kpatch.train_editor(kpatch.load_model(str(model)), training_facts(), out)
    for said in ("−log P", "written", "all 10 steps were taken", "kpatch make FACTS"):
        assert said in again.out + again.err, said

    facts = save_facts(tmp_path / "f.yaml", [{"subject": "Chicago", "prompt": "The city {} is in", "target": "Rome"}])
    made = run("make", facts, "--model", model, "-o", patch, "--method", "mend", "--editor", editor, "--json")
    assert made.code == 0, made.err
    assert made.json["layers"] == [1, 2, 3]
    assert read_patch(patch).manifest.hyperparameters["editor"] == told["sha256"]
    assert len(read_patch(patch).deltas) == 9
    assert "mend" in run("show", patch).out
    before = snapshot(model)
    assert run("apply", patch, model).code == 0
    assert run("revert", model).code == 0
    assert snapshot(model) == before
    exported = run("export", patch, "--to", "peft", "-o", tmp_path / "lora")
    assert exported.code == 0, exported.err
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in factors} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "rome", "MODEL", "DATA", "-o", "OUT"), "No editor can be trained for the method 'rome'"),
        (("train", "mend", "MODEL", "nothing.yaml", "-o", "OUT"), "There is no such file"),
        (("train", "mend", "MODEL", "DATA", "-o", "OUT", "--limit", 1), "too few facts"),
        (("train", "mend", "MODEL", "DATA", "-o", "OUT", "--layers", "7"), "has no layer 7"),
        (("train", "mend", "MODEL", "DATA", "-o", "OUT", "--set", "rankk=3"), "did you mean rank?"),
        (("train", "mend", "MODEL", "DATA", "-o", "OUT", "--set", "rank=0"), "expected more than 0"),
        (("train", "mend", "MODEL", "DATA", "-o", "OUT", "--set", "steps=x"), "is not a whole number"),
        (("make", "DATA", "--model", "MODEL", "-o", "OUT", "--method", "mend"), "--editor"),
        (("make", "DATA", "--model", "MODEL", "-o", "OUT", "--method", "mend", "--editor", "DATA"), "cannot be read"),
        (("make", "DATA", "--model", "MODEL", "-o", "OUT", "--editor", "DATA"), "takes no trained editor"),
    ],
)
def test_what_is_refused(arguments: tuple[object, ...], said: str, model: Path, data: Path, tmp_path: Path) -> None:
    named = {"MODEL": model, "DATA": data, "OUT": tmp_path / "out.safetensors"}
    done = run(*(named.get(str(word), word) for word in arguments))
    assert done.code in (2, 4), done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out.safetensors").exists()


def test_an_editor_that_exists_is_not_written_over(model: Path, data: Path) -> None:
    done = run("train", "mend", model, data, "-o", data)
    assert done.code == 3
    assert "exists" in done.err
