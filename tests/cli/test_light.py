"""What commands import: those that need no model and take no sum start without anything heavy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import make_patch
from tests.support.cli import Light, python, run

# Readers of fact files: a third of the time in which the command line starts, where no command needs them
READERS = ("yaml", "kpatch.facts.check")


def loaded(among: tuple[str, ...], *arguments: str | Path) -> list[str]:
    """Which modules of `among` a command that ends well has imported, in a process of its own."""
    said = python(
        "import sys\nfrom kpatch.cli.app import main\n"
        f"code = main({[str(argument) for argument in arguments]!r})\n"
        f"print(code, *[name for name in {among!r} if name in sys.modules])"
    )
    code, *names = said.splitlines()[-1].split()
    assert code == "0", said
    return names


@pytest.mark.parametrize("command", ["--help", "show", "verify", "status", "lint", "models", "recover"])
def test_light_commands_import_nothing_heavy(
    command: str, patch: Path, checkpoint: Path, facts: Path, light: Light
) -> None:
    given = {
        "show": [patch],
        "verify": [patch, checkpoint],
        "status": [checkpoint],
        "lint": [facts],
        "recover": [checkpoint],
    }
    assert light.run(command, *given.get(command, [])).code == 0


@pytest.mark.parametrize("command", ["status", "log", "revert", "verify"])
def test_a_patched_checkpoint_needs_nothing_heavy_where_no_sum_is_taken(
    command: str, patch: Path, checkpoint: Path, light: Light
) -> None:
    run("apply", patch, checkpoint)
    given = [patch, checkpoint] if command == "verify" else [checkpoint]
    assert light.run(command, *given).code == 0


def test_taking_one_of_several_patches_off_takes_a_sum(patch: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.patch"
    make_patch(other, checkpoint, seed=2, facts=[{"subject": "Kyoto", "prompt": "{} is in", "target": "Peru"}])
    run("apply", patch, other, checkpoint)
    assert loaded(("torch",), "revert", other, checkpoint) == ["torch"]


@pytest.mark.parametrize("command", ["--help", "show", "log"])
def test_the_command_line_starts_without_what_reads_fact_files(command: str, patch: Path, checkpoint: Path) -> None:
    given = {"show": [patch], "log": [checkpoint]}.get(command, [])
    assert loaded(READERS, command, *given) == []
