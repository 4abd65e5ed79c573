"""Every command from the outside: its help, its text, its JSON object, its exit code."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kpatch
from kpatch.cli.app import app
from kpatch.cli.targets import last_applied
from tests.support import checkpoints
from tests.support.cli import run

COMMANDS = (
    *"trace make show verify apply revert status log recover stack diff export".split(),
    *"ask eval probe import lint cov tune train memories models".split(),
)


def sums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".kpatch" not in path.parts)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Help


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    done = CliRunner().invoke(app, ["--help"], prog_name="kpatch")
    assert done.exit_code == 0
    commands = done.output.partition("Commands:")[2].partition("Exit codes")[0]
    assert sorted(re.findall(r"^  (\w+)  +\S", commands, re.M)) == sorted(COMMANDS)
    assert "..." not in commands, "a command's first line must fit"
    for code in ("0", "1", "2", "3", "4", "130"):
        assert re.search(rf"^ +{code}  \w", done.output, re.M)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_two_examples_and_the_common_options(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], prog_name="kpatch")
    assert done.exit_code == 0
    assert len(re.findall(rf"^ +kpatch {name}\b", done.output.partition("Examples:")[2], re.M)) == 2
    for option in ("--json", "-q, --quiet", "-v, --verbose"):
        assert option in done.output


def test_version() -> None:
    done = run("--version")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"kpatch \d+\.\d+\.\d+\S*\n", done.out)


def test_no_arguments_show_the_help_as_a_usage_error() -> None:
    done = run()
    assert (done.code, done.out) == (2, "")
    assert "Usage: kpatch" in done.err


# show and verify


def test_show(patch: Path) -> None:
    done = run("show", patch)
    assert (done.code, done.err) == (0, "")
    for said in (
        "tiny/model",
        "memit",
        "self, 1,000 tokens",
        "Subject 1 is in",
        "Paris",
        "98.8 %",
        "8 × 12",
        "Efficacy",
    ):
        assert said in done.out, said


def test_show_as_json(patch: Path) -> None:
    done = run("show", patch, "--json")
    data = done.json
    assert (done.code, done.err) == (0, "")
    assert data["bytes"] == patch.stat().st_size
    assert data["facts"][0]["target"] == "Rome"
    assert data["layers"] == [0, 1, 2]
    assert [set(weight) for weight in data["weights"]] == [{"name", "shape", "rank", "norm", "relative_norm"}] * 3


def test_show_without_a_measured_effect(tmp_path: Path, checkpoint: Path) -> None:
    facts = [{"subject": f"Town {n}", "prompt": "{} lies in", "target": "Peru", "id": str(n)} for n in range(30)]
    checkpoints.make_patch(tmp_path / "x.patch", checkpoint, facts=facts)
    done = run("show", tmp_path / "x.patch")
    assert "Town 24 lies in" in done.out
    assert "Town 25 lies in" not in done.out
    assert "5 more facts" in done.out
    assert "Town 29 lies in" in run("show", tmp_path / "x.patch", "-v").out


def test_a_patch_cannot_write_to_the_terminal(tmp_path: Path, checkpoint: Path) -> None:
    evil = {"subject": "\x1b[2J\u202eX", "prompt": "{} [red]is[/red] :smile:\nin", "target": "\x07Rome", "id": "x"}
    checkpoints.make_patch(tmp_path / "x.patch", checkpoint, facts=[evil])
    out = run("show", tmp_path / "x.patch").out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)
    assert "[red]is[/red] :smile:\\nin" in out


def test_verify(patch: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert run("verify", patch).code == 0
    fits = run("verify", patch, checkpoint, "--json")
    assert (fits.code, fits.json["intact"], fits.json["fits"]) == (0, True, True)
    other = checkpoints.make_checkpoint(tmp_path / "other", seed=99)
    done = run("verify", patch, other)
    assert done.code == 1
    assert "not the base it was made for" in done.err
    data = run("verify", patch, other, "--json").json
    assert (data["fits"], data["error"]["code"]) == (False, "check_failed")


def test_a_patch_cut_off_in_the_middle(patch: Path) -> None:
    patch.write_bytes(patch.read_bytes()[:-10])
    for command in ("show", "verify"):
        done = run(command, patch)
        assert (done.code, done.out) == (4, "")
        assert "cut off" in done.err


# apply, status, revert


def test_apply_and_revert(patch: Path, checkpoint: Path) -> None:
    before = sums(checkpoint)
    done = run("apply", patch, checkpoint)
    assert done.code == 0
    assert "Applied news" in done.out
    assert sums(checkpoint) != before
    status = run("status", checkpoint)
    assert "clean" in status.out
    assert "news" in status.out
    again = run("apply", patch, checkpoint, "--json")
    assert (again.code, again.json["error"]["code"]) == (3, "refused")
    done = run("revert", checkpoint)
    assert done.code == 0
    assert "Reverted news" in done.out
    assert sums(checkpoint) == before
    assert run("revert", checkpoint).code == 3


def test_the_json_of_apply_status_and_revert(patch: Path, checkpoint: Path) -> None:
    keys = {"model", "patches", "weights", "seconds", "state"}
    applied = run("apply", patch, checkpoint, "--json").json
    assert keys <= set(applied)
    assert set(applied["weights"][0]) == {"name", "unchanged", "delta_error", "key_error"}
    status = run("status", checkpoint, "--json").json
    assert {"state", "base", "patches", "kept_bytes", "next"} <= set(status)
    assert (status["state"], status["patches"][0]["name"], status["patches"][0]["facts"]) == ("clean", "news", 1)
    assert keys <= set(run("revert", checkpoint, "--json").json)


def test_check_writes_nothing(patch: Path, checkpoint: Path) -> None:
    before = checkpoints.times(checkpoint)
    done = run("apply", patch, checkpoint, "--check")
    assert done.code == 0
    assert "Would apply" in done.out
    assert checkpoints.times(checkpoint) == before


def test_apply_into_a_copy(patch: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = sums(checkpoint)
    assert run("apply", patch, checkpoint, "-o", tmp_path / "patched").code == 0
    assert sums(checkpoint) == before
    assert sums(tmp_path / "patched") != before


def test_revert_means_the_checkpoint_here_then_the_one_last_applied_to(
    patch: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sums(checkpoint)
    run("apply", patch, checkpoint)
    monkeypatch.chdir(tmp_path)
    done = run("revert")
    assert done.code == 0
    assert str(checkpoint) in done.err.splitlines()[0], "it is named first"
    assert sums(checkpoint) == before
    run("apply", patch, checkpoint)
    other = checkpoints.make_checkpoint(tmp_path / "other", seed=5)
    checkpoints.make_patch(tmp_path / "b.patch", other)
    run("apply", tmp_path / "b.patch", other)
    monkeypatch.chdir(checkpoint)
    assert run("revert").code == 0
    assert sums(checkpoint) == before
    assert "b" in run("status", other).out


def test_the_last_checkpoint_is_remembered_until_it_is_bare(patch: Path, checkpoint: Path, tmp_path: Path) -> None:
    checkpoints.make_patch(tmp_path / "b.patch", checkpoint, seed=3)
    kpatch.apply([tmp_path / "b.patch"], checkpoint)
    assert last_applied() is None, "memory of the command line, not of the library"
    run("apply", patch, checkpoint)
    assert last_applied() == checkpoint
    run("revert", checkpoint)
    assert last_applied() == checkpoint
    run("revert", checkpoint)
    assert last_applied() is None


def test_revert_by_name_and_all(patch: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = sums(checkpoint)
    checkpoints.make_patch(tmp_path / "b.patch", checkpoint, seed=3)
    run("apply", patch, tmp_path / "b.patch", checkpoint)
    assert run("revert", patch, checkpoint).code == 0
    assert [row["name"] for row in run("status", checkpoint, "--json").json["patches"]] == ["b"]
    assert run("revert", "b", "--all", checkpoint).code == 2
    assert run("revert", "--all", checkpoint).code == 0
    assert sums(checkpoint) == before


def test_no_checkpoint_to_revert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("revert", "status", "recover"):
        done = run(command)
        assert done.code == 2
        assert "MODEL_DIR" in done.err


def test_a_patch_for_another_model_is_refused(patch: Path, tmp_path: Path) -> None:
    other = checkpoints.make_checkpoint(tmp_path / "other", seed=99)
    before = checkpoints.times(other)
    done = run("apply", patch, other)
    assert (done.code, done.out) == (3, "")
    assert "not the base it was made for" in done.err
    assert "hint: " in done.err
    assert checkpoints.times(other) == before


def test_recover_with_nothing_to_do(checkpoint: Path) -> None:
    done = run("recover", checkpoint, "--json")
    assert (done.code, done.json["outcome"]) == (0, "nothing")


# lint and models


def test_lint(facts: Path) -> None:
    done = run("lint", facts)
    assert done.code == 0
    assert "1 fact," in done.out
    assert run("lint", facts, "--json").json["facts"] == 1


def test_lint_tells_every_error_with_its_place(facts: Path) -> None:
    facts.write_text("facts:\n- {subject: A, prompt: no slot, target: x}\n- {subjct: B}\n", encoding="utf-8")
    done = run("lint", facts)
    assert (done.code, done.out) == (2, "")
    assert {"2", "3"} <= set(re.findall(r"facts\.yaml:(\d+):\d+: ", done.err))
    error = run("lint", facts, "--json").json["error"]
    assert len(error["details"]) >= 2


def test_models() -> None:
    out = run("models").out
    for word in ("gpt-j", "EleutherAI/gpt-j-6b", "smollm2", "gemma3_text"):
        assert word in out
    data = run("models", "--json").json
    assert {"gpt-j", "gpt2-xl", "neox", "smollm2"} <= {row["name"] for row in data["aliases"]}
    assert all(row["source"] for row in data["presets"])


def test_models_finds_one(checkpoint: Path) -> None:
    done = run("models", checkpoint)
    assert (done.code, done.out) == (0, f"{checkpoint}\n")
    assert run("models", checkpoint, "--json").json["kind"] == "directory"
    assert run("models", "./nowhere").code == 2


def test_log_tells_what_was_done(patch: Path, checkpoint: Path) -> None:
    assert "no log is kept" in run("log", checkpoint).out
    run("apply", patch, checkpoint)
    shown = run("log", checkpoint)
    assert (shown.code, shown.out.count("apply")) == (0, 1)
    assert "news" in shown.out
    (entry,) = run("log", checkpoint, "--json").json["entries"]
    assert set(entry) == {"time", "action", "patches"}
    assert entry["patches"][0]["name"] == "news"
