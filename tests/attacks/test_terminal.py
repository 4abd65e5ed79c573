"""Facts are text from elsewhere: whatever stands in them, no command lets it steer the terminal or forge a line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import cli
from tests.support.checkpoints import make_checkpoint, make_patch

EVIL = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202eno\u2066\u2028[red]x[/red]"
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069]")
FACT = {
    **{"subject": f"Mars{EVIL}", "prompt": "{} is in" + EVIL, "target": f"Rome{EVIL}", "id": f"one{EVIL}"},
    **{"was": f"Oslo{EVIL}", "source": f"https://x{EVIL}", "relation": f"place{EVIL}"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, and two patches that contradict each other; the first has an evil name too."""
    model = make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / f"a{EVIL.replace('/', '')}.patch", model, facts=[FACT])
    make_patch(tmp_path / "b.patch", model, facts=[{**FACT, "target": f"Bern{EVIL}"}], seed=2)
    return tmp_path


def test_no_command_passes_control_characters_on(folder: Path) -> None:
    model = folder / "model"
    evil = next(path for path in folder.glob("a*.patch"))
    runs = [
        *(("show", evil), ("show", evil, "-v"), ("verify", evil), ("verify", evil, model, "-v")),
        *(("apply", evil, folder / "b.patch", model), ("apply", evil, model, "--check"), ("apply", evil, model)),
        *(("apply", evil, model), ("apply", folder / "b.patch", model), ("status", model, "-v"), ("log", model, "-v")),
        *(("revert", f"x{EVIL}", model), ("show", f"{evil}x"), ("revert", evil, model), ("revert", model)),
    ]
    codes = []
    for arguments in runs:
        ran = cli.run(*arguments)
        codes.append(ran.code)
        for text in (ran.out, ran.err):
            odd = {
                hex(ord(c))
                for c in text
                if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066\u2028"
            }
            assert not odd, (arguments[0], odd, text)
        told = cli.run(*arguments, "--json") if arguments[0] in ("show", "status", "log", "verify") else None
        assert told is None or "\x1b" not in told.out
    assert codes == [0, 0, 0, 0, 3, 0, 0, 3, 3, 0, 0, 3, 2, 0, 3]
