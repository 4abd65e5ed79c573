"""Several processes at one job, started by torchrun: the patch and trace of one process, and one error message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kpatch import distributed
from kpatch.errors import BadInput
from kpatch.models.address import resolve
from kpatch.models.model import load_model
from tests.support.cli import ROOT, Ran, run
from tests.support.models import tiny
from tests.support.tracing import known_facts, model_of

pytestmark = pytest.mark.slow

# Memory for a few facts at a time, and text of three groups: something to share
MAKE = (
    *("--layers", "1-2", "--tokens", "1400", "--memory", "1500KB"),
    *("--set", "steps=4", "--set", "lead_ins=1", "--set", "refine=3", "--set", "refine_from=1"),
)
TRACE = ("--samples", "3", "--window", "2", "--memory", "100KB", "--json")
SUBJECTS = ("Eiffel Tower", "Chicago", "Mona Lisa", "Moonlight Sonata", "The", "Big Ben", "Brazil")


@dataclass(frozen=True)
class World:
    folder: Path
    single: dict[str, Ran]
    primitives: tuple[dict[str, Any], ...]
    shared: dict[str, tuple[Ran, Ran]]  # of ranks 0 and 1
    seconds: dict[str, float]  # of rank 0


def torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "KPATCH_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=env,
        check=False,
        timeout=300,
    )


def ran(found: dict[str, Any]) -> Ran:
    return Ran(found["code"], found["out"], found["err"])


def save(model: Any, folder: Path) -> Path:
    model.net.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """All command lines, once in this process and once in two of torchrun's."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    model, other = save(tiny("llama"), folder / "tiny"), save(tiny("llama", seed=1), folder / "other" / "tiny")
    known = save(model_of(), folder / "known")
    facts = write(
        folder / "facts.yaml",
        {
            "facts": [
                {
                    "subject": subject,
                    "prompt": "{} is in" if number % 2 else "The famous {} stands in",
                    "target": ("Rome", "Brazil")[number % 2],
                    "was": "Paris",
                    "paraphrases": ["{} stands in"],
                }
                for number, subject in enumerate(SUBJECTS)
            ]
        },
    )
    wrong = write(folder / "wrong.yaml", {"facts": [{"subject": "X", "prompt": "no slot", "target": "Y"}]})
    rows = [{"subject": fact.subject, "attribute": fact.target, "prompt": fact.text()} for fact in known_facts()]
    to_trace = write(folder / "known.json", rows)

    def make(name: str, *more: object, model: Path = model, facts: Path = facts) -> list[str]:
        return list(map(str, ("make", facts, "--model", model, "-o", folder / name, *MAKE, *more)))

    single = {
        "make": make("single.patch", "--json"),
        "again": make("single-again.patch", "--set", "leverage=0.5", "--json"),
        "rome": [
            *("make", str(facts), "--model", str(model), "-o", str(folder / "single-rome.patch"), "--method", "rome"),
            *("--layers", "1", "--tokens", "400", "--set", "prefixes=2", "--set", "steps=2"),
        ],
        "trace": ["trace", str(known), "--facts", str(to_trace), *TRACE],
    }
    shared: dict[str, dict[str, Any]] = {
        "make": {"arguments": make("shared.patch", "--json")},
        "again": {"arguments": make("shared-again.patch", "--set", "leverage=0.5", "--json")},
        "rome": {"arguments": [word.replace("single", "shared") for word in single["rome"]]},
        "trace": {"arguments": single["trace"]},
        "traced before": {"arguments": single["trace"]},
        "cov": {"arguments": ["cov", str(model), "--layers", "0-1", "--tokens", "700", "--json"]},
        "wrong facts": {"arguments": make("wrong.patch", facts=wrong)},
        "wrong facts, JSON": {"arguments": make("wrong.patch", "--json", facts=wrong)},
        "short": {"arguments": make("short.patch", "--min-efficacy", "1", "--json")},
        "error": {"arguments": make("error.patch", "--afresh"), "trouble": "error"},
        "bug": {"arguments": make("bug.patch", "--afresh"), "trouble": "bug"},
        "interrupt": {"arguments": make("interrupt.patch", "--afresh"), "trouble": "interrupt"},
        "other weights": {
            "arguments": make("other.patch"),
            "arguments of rank 1": make("other.patch", model=other),
        },
        "apply": {"arguments": ["apply", str(folder / "shared.patch"), str(model), "--check"]},
        "help": {"arguments": ["make", "--help"]},
        "after": {"arguments": make("after.patch", "-q")},
    }
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache-single"))
        alone = {name: run(*arguments) for name, arguments in single.items()}
    results = folder / "results"
    results.mkdir()
    given = write(folder / "given.json", {"folder": str(results), "scenarios": list(shared.values())})
    done = torchrun(folder, "-m", "tests.support.ranked", given)
    assert done.returncode == 0, done.stderr

    def read(rank: int, name: object) -> Any:
        return json.loads((results / f"{rank}-{name}.json").read_text(encoding="utf-8"))

    return World(
        folder,
        alone,
        (read(0, "primitives"), read(1, "primitives")),
        {name: (ran(read(0, n)), ran(read(1, n))) for n, name in enumerate(shared)},
        {name: read(0, n)["seconds"] for n, name in enumerate(shared)},
    )


def test_tasks_are_dealt_out_and_all_ranks_know_the_results(world: World) -> None:
    first, second = world.primitives
    assert first["share"] == second["share"] == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]
    assert first["none"] == second["none"] == []
    assert first["main"] == second["main"] == 0
    assert first["nested"] == second["nested"] == [1, 2, 3], "inside main_does rank 0 works by itself"
    assert first["within"] == second["within"] == [[True, 0], [True, 1]], "inside share every rank works by itself"
    assert (first["main rank"], second["main rank"]) == (True, False)
    assert (first["mine"], second["mine"]) == ([True, False, True], [False, True, False])


def test_a_single_process_just_does_the_work() -> None:
    assert not distributed.launched()
    assert distributed.share([1, 2], lambda task: task + 1) == [2, 3]
    assert distributed.main_does(lambda: 7) == distributed.same("numbers", lambda: 7) == 7
    assert distributed.is_main()
    assert distributed.mine(3)
    distributed.finish()
    distributed.leave()


def test_each_process_of_a_machine_takes_its_own_device(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    zeros = torch.zeros

    def fake(*shape: int, device: torch.device) -> torch.Tensor:
        asked.append(str(device))
        return zeros(*shape)

    def too_much(*arguments: object, **settings: object) -> object:
        raise torch.OutOfMemoryError("tried to allocate 30 GiB")

    monkeypatch.setattr(torch, "zeros", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", too_much)
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "MASTER_ADDR": "there", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    for device in ("auto", "cuda", "cuda:3", "cpu"):
        with pytest.raises(BadInput, match="larger than the memory of"):
            load_model(resolve(str(world.folder / "tiny")), device=device)
    assert asked == ["cuda:1", "cuda:1", "cuda:3", "cpu"]


@pytest.mark.parametrize("name", ["make", "again", "rome"])
def test_the_same_patch_as_one_process_makes(name: str, world: World) -> None:
    alone, (shared, silent) = world.single[name], world.shared[name]
    assert (alone.code, shared.code, silent.code) == (0, 0, 0), shared.err
    suffix = "" if name == "make" else f"-{name}"
    single = (world.folder / f"single{suffix}.patch").read_bytes()
    assert (world.folder / f"shared{suffix}.patch").read_bytes() == single
    if name == "make":
        assert shared.json["patch"]["id"] == alone.json["patch"]["id"]
        assert shared.json["effect"] == alone.json["effect"]


def test_rank_1_says_nothing(world: World) -> None:
    for name, (_, second) in world.shared.items():
        assert (second.out, second.err) == ("", ""), name


def test_values_and_text_were_shared(world: World) -> None:
    """Rank 0 alone keeps text; both ranks keep the values that they found."""
    single, shared = world.folder / "cache-single", world.folder / "cache"
    values = {path.name for path in (single / "values").iterdir()}
    assert 3 <= len(values) < len(SUBJECTS), "batches of several facts"
    assert values <= {path.name for path in (shared / "values").iterdir()}
    texts = sorted(path.name for path in shared.glob("covariance/*/text-*"))
    assert texts.count("text-0.safetensors") == 1
    assert {"text-1.safetensors", "text-2.safetensors"} <= set(texts)


@pytest.mark.parametrize("name", ["trace", "traced before"])
def test_the_same_trace(name: str, world: World) -> None:
    alone, (shared, _) = world.single["trace"].json, world.shared[name]
    assert shared.code == 0, shared.err
    found = shared.json
    assert alone.pop("seconds") > 0 < found.pop("seconds")
    assert found == alone


def test_cov(world: World) -> None:
    done = world.shared["cov"][0]
    assert done.code == 0, done.err
    assert (done.json["layers"], done.json["tokens"]) == ([0, 1], 700)


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("wrong facts", 2, "error: The fact file has 1 error"),
        ("error", 2, "error: rank 1 is unwell"),
        ("bug", 1, "ZeroDivisionError: one over nothing"),
        ("interrupt", 130, "error: Interrupted"),
        ("other weights", 2, "error: Rank 1 has other weights than rank 0"),
    ],
)
def test_an_error_ends_all_ranks_with_one_message(name: str, code: int, said: str, world: World) -> None:
    first, second = world.shared[name]
    assert (first.code, second.code) == (code, code)
    assert first.err.count("error:") == 1
    assert said in first.err
    assert "Traceback" not in first.err
    assert world.seconds[name] < 90, "rank 0 was interrupted in work of three minutes"
    assert list(world.folder.glob(f"{name.split()[0]}.patch")) == []


def test_errors_as_json(world: World) -> None:
    first, second = world.shared["wrong facts, JSON"]
    assert (first.code, second.code) == (2, 2)
    assert first.json["error"]["message"] == "The fact file has 1 error"
    first, second = world.shared["short"]
    assert (first.code, second.code) == (1, 1)
    assert first.json["error"]["code"] == "check_failed"
    assert first.json["patch"]["id"], "the patch was made all the same"


def test_the_rest_is_for_one_process(world: World) -> None:
    first, second = world.shared["apply"]
    assert (first.code, second.code) == (2, 0)
    assert "one process" in first.err
    first, second = world.shared["help"]
    assert (first.code, second.code) == (0, 0)
    assert "Examples:" in first.out


def test_after_errors_the_next_run_is_whole(world: World) -> None:
    assert world.shared["after"][0].code == 0
    assert (world.folder / "after.patch").read_bytes() == (world.folder / "single.patch").read_bytes()


def test_torchrun_reports_our_exit_code(world: World) -> None:
    """torchrun itself ends with 1 whatever its processes end with, and names their code."""
    done = torchrun(world.folder, "-m", "kpatch", "make", world.folder / "wrong.yaml", "-o", world.folder / "x.patch")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("error: The fact file has 1 error") == 1
    assert "exitcode: 2" in done.stderr or "exitcode  : 2" in done.stderr
