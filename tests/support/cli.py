"""Running the command line from tests: in this process, or as a user does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpatch.cli.app import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    """How a run ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout as the one JSON object that it must be."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert value["schema_version"] == 1
        return value


def run(*arguments: object) -> Ran:
    """One command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


def spawn(*arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> Ran:
    """One command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "kpatch", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        cwd=cwd,
        check=False,
        timeout=60,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


HEAVY = ("torch", "transformers", "numpy", "huggingface_hub")
_SERVE = f"""
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from kpatch.cli.app import main
for line in sys.stdin:
    arguments, environment = json.loads(line)
    os.environ.update(environment)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    print(json.dumps([code, out.getvalue(), err.getvalue(), heavy]), flush=True)
"""


class Light:
    """A process that has imported the command line alone and runs one after another; it ends with the `with` block."""

    def __enter__(self) -> Light:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command, pipe = [sys.executable, "-c", _SERVE], subprocess.PIPE
        self.process = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, env=env)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def run(self, *arguments: object) -> Ran:
        """How the command line ended. Asserts that nothing heavy is loaded in the process, by this or one before."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        kept = {name: os.environ[name] for name in ("KPATCH_CACHE", "HF_HOME")}
        stdin.write(json.dumps([[str(argument) for argument in arguments], kept]) + "\n")
        stdin.flush()
        code, out, err, heavy = json.loads(stdout.readline())
        assert heavy == []
        return Ran(code, out, err)


def python(code: str) -> str:
    """What a Python program prints, run in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True, timeout=60
    )
    return done.stdout.strip()
