"""Blocks of documentation, and a shell to paste them into: bash itself, with kpatch answered by this process."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.cli import Ran

Program = Callable[[Sequence[str]], Ran]

# What stands for the programs on the shell's PATH: it hands name, folder and arguments over and passes the answer on.
# It starts in some hundredths of a second, where importing torch anew for every line would take many seconds.
_CLIENT = """\
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect(sys.argv[1])
    line.sendall(json.dumps([sys.argv[2], os.getcwd(), *sys.argv[3:]]).encode())
    line.shutdown(socket.SHUT_WR)
    code, out, err = json.loads(b"".join(iter(lambda: line.recv(65536), b"")))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page, with the line that its fence stands on."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, top to bottom."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\S*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, hit.start()) + 1, hit[1], hit[2]) for hit in found]


def paste(text: str, programs: Mapping[str, Program]) -> tuple[int, str]:
    """Paste `text` into bash in the current directory; gives the exit code and all that was written.

    It ends at the first command that fails. `programs` answers, in this process, for the programs of these names.
    """
    with tempfile.TemporaryDirectory(prefix="paste-") as folder, socket.socket(socket.AF_UNIX) as server:
        tools = Path(folder)
        server.bind(str(tools / "line"))
        server.listen()
        server.settimeout(0.02)
        (tools / "client.py").write_text(_CLIENT, encoding="utf-8")
        for name in programs:
            call = shlex.join([sys.executable, "-SE", str(tools / "client.py"), str(tools / "line"), name])
            (tools / name).write_text(f'#!/bin/sh\nexec {call} "$@"\n', encoding="utf-8")
            (tools / name).chmod(0o755)
        with (tools / "log").open("wb") as log:
            shell = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
            )
            for connection in _calls(server, shell):
                with connection:
                    _answer(connection, programs)
        return shell.returncode, (tools / "log").read_text(encoding="utf-8")


def _calls(server: socket.socket, shell: subprocess.Popen[bytes]) -> Iterator[socket.socket]:
    """One connection for each call, until the shell has ended."""
    while shell.poll() is None:
        try:
            connection = server.accept()[0]
        except TimeoutError:
            continue
        connection.settimeout(None)
        yield connection


def _answer(connection: socket.socket, programs: Mapping[str, Program]) -> None:
    name, folder, *arguments = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = programs[name](arguments)
    finally:
        os.chdir(before)
    said = f"$ {shlex.join([name, *arguments])}\n{done.err}"
    connection.sendall(json.dumps([done.code, done.out, said]).encode())
