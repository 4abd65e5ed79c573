"""The error boundary and the output sink: exit codes, pure stdout, no traceback, one JSON object whatever happens."""

from __future__ import annotations

import errno
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from kpatch.cli import parse
from kpatch.cli.app import app
from kpatch.cli.commands import show
from kpatch.cli.errors import translate
from kpatch.cli.options import option_names, with_options
from kpatch.cli.output import Output, clean, output, plain
from kpatch.errors import BadInput, CheckFailed, Damaged, KpatchError, Refused
from kpatch.text import counted, format_size
from tests.support.cli import ROOT, Ran, python, run, spawn

ERRORS: list[tuple[BaseException, int, str]] = [
    (CheckFailed("no"), 1, "check_failed"),
    (BadInput("no"), 2, "bad_input"),
    (Refused("no"), 3, "refused"),
    (Damaged("no"), 4, "damaged"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device", "/full"), 1, "failed"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), 2, "bad_input"),
    (PermissionError(errno.EACCES, "Permission denied", "mine"), 2, "bad_input"),
    (MemoryError(), 1, "failed"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "failed"),
    (ZeroDivisionError("division by zero"), 1, "internal"),
]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `kpatch show` raise."""

    def set_error(error: BaseException) -> None:
        def fail(path: Path) -> None:
            raise error

        monkeypatch.setattr("kpatch.patch.header.read_header", fail)

    return set_error


def ids(case: object) -> str:
    return type(case).__name__ if isinstance(case, BaseException) else str(case)


@pytest.mark.parametrize(("error", "exit_code", "code"), ERRORS, ids=ids)
def test_every_error_is_told_once(
    error: BaseException, exit_code: int, code: str, failing: Callable[[BaseException], None]
) -> None:
    failing(error)
    done = run("show", "x.patch")
    assert (done.code, done.out) == (exit_code, "")
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    as_json = run("show", "x.patch", "--json")
    assert (as_json.code, as_json.err) == (exit_code, "")
    assert as_json.json["error"]["code"] == code
    assert {"code", "message", "hint", "where"} <= set(as_json.json["error"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full"), "No space left on the disk"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on the disk"),
        (MemoryError(), "Out of memory"),
    ],
    ids=ids,
)
def test_a_full_disk_or_memory_is_said_in_words(error: Exception, said: str) -> None:
    found = translate(error)
    assert found.message == said
    assert found.hint


def test_an_error_says_what_where_and_what_next(failing: Callable[[BaseException], None]) -> None:
    failing(Refused("It does not fit", where="w", details=["expected a", "found b"], hint="do this"))
    assert run("show", "x").err == "error: It does not fit\n  in w\n  expected a\n  found b\nhint: do this\n"


def test_an_error_cannot_write_to_the_terminal(failing: Callable[[BaseException], None]) -> None:
    failing(BadInput("a\x1b[31mb\nc", details=["\x07"], hint="\u202e"))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", run("show", "x").err)


SPELLED = {
    "make": {
        "`layers_from` and `layers`": "--layers-from and --layers",
        "`out`, or `force`": "-o, or --force",
        "`settings` and `set` change it": "--set and --set change it",
        "try `dtype=float32`, `resume=True`": "try --dtype float32, --resume",
        "write `model: smollm2` in `facts`": "write `model: smollm2` in FACTS",
        "`tolerance` and `kpatch make --on`": "`tolerance` and `kpatch make --on`",
    },
    "revert": {"`all`": "--all", "`force`": "--force", "`layers`": "`layers`"},
    "import": {"`format`": "--from", "`out`": "-o"},
    "frob": {"`out`": "`out`"},
}


@pytest.mark.parametrize(
    ("command", "text", "shown"), [(name, text, shown) for name in SPELLED for text, shown in SPELLED[name].items()]
)
def test_a_parameter_in_a_message_is_shown_as_the_option_of_the_command(command: str, text: str, shown: str) -> None:
    assert with_options(text, option_names(app, command)) == shown


def test_errors_name_options(failing: Callable[[BaseException], None]) -> None:
    failing(Refused("`verbose` is wrong", where="`quiet`", details=["or `quiet`"], hint="leave out `verbose`"))
    assert run("show", "x").err == "error: -v is wrong\n  in `quiet`\n  or -q\nhint: leave out -v\n"
    found = run("show", "x", "--json").json["error"]
    assert (found["message"], found["details"], found["hint"]) == ("-v is wrong", ["or -q"], "leave out -v")
    assert found["where"] == "`quiet`"


def test_notes_and_warnings_name_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> None:
        output().note("a note on `quiet`")
        output().warn("a warning of `json`")
        raise BadInput("no")

    monkeypatch.setattr("kpatch.patch.header.read_header", read)
    assert run("show", "x").err == "a note on -q\nwarning: a warning of --json\nerror: no\n"


def test_help_on_memory_names_the_default_that_is_used() -> None:
    from kpatch.edit import values_cache
    from kpatch.trace import memory

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    helps = {
        name: option.help for name, command in commands.items() for option in command.params if option.name == "memory"
    }
    assert set(helps) == {"make", "stack", "trace", "train", "tune"}
    for name, text in helps.items():
        default = memory.DEFAULT_BUDGET if name == "trace" else values_cache.DEFAULT_BUDGET
        assert parse.memory(text.rpartition("Default: ")[2].rstrip(".")) == default, name


def test_debug_shows_the_traceback(failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(ZeroDivisionError("division by zero"))
    assert "KPATCH_DEBUG=1" in run("show", "x").err
    monkeypatch.setenv("KPATCH_DEBUG", "1")
    assert "Traceback" in run("show", "x").err


@pytest.mark.parametrize(
    "arguments",
    [
        ["frob"],
        ["show"],
        ["show", "--frob"],
        ["make", "f.yaml", "--min-efficacy", "2"],
        ["make", "f.yaml", "--layers", "8-4"],
        ["make", "f.yaml", "--set", "steps"],
        ["make", "f.yaml", "--memory", "lots"],
        ["make", "f.yaml", "--memory", "-1"],
        ["stack", "a.patch", "--resolve", "-o", "b.patch", "--memory", "-1"],
        ["tune", "m", "--memory=-1"],
        ["trace", "m", "--memory", "-1"],
        ["make", "f.yaml", "--modules", "down"],
        ["make", "nowhere.yaml"],
        ["ask", "m", " "],
        ["ask", "./nowhere", "Hello"],
        ["cov", "./nowhere"],
        ["lint", "nowhere.yaml"],
        ["show", "nowhere.patch"],
        ["apply", "nowhere.patch", "nowhere/"],
        ["status", "nowhere/"],
        ["revert", "nowhere/"],
    ],
    ids=" ".join,
)
def test_bad_usage_and_bad_input_exit_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    as_json = run(*arguments, "--json")
    assert as_json.code == 2
    assert as_json.json["error"]["message"]
    if "--memory" in " ".join(arguments):
        assert "--memory" in as_json.json["error"]["message"]


def test_json_after_two_dashes_is_no_option() -> None:
    done = run("show", "--", "--json")
    assert done.out == ""
    assert done.err.startswith("error: ")


def test_an_output_that_exists_is_refused_before_any_work(facts: Path, tmp_path: Path) -> None:
    (tmp_path / "x.patch").write_text("mine", encoding="utf-8")
    done = run("make", facts, "-o", tmp_path / "x.patch", "--model", "./nowhere")
    assert done.code == 3
    assert "--force" in done.err
    assert run("make", facts, "-o", tmp_path / "gone" / "x.patch").code == 2
    assert run("make", facts, "-o", tmp_path).code == 2


# As a process


def test_a_process_keeps_stdout_for_data(patch: Path) -> None:
    done = spawn("show", patch, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["method"] == "memit"
    failed = spawn("show", patch.parent / "nowhere.patch")
    assert (failed.code, failed.out) == (2, "")
    assert "Traceback" not in failed.err


def test_a_reader_that_goes_away_is_no_error(patch: Path) -> None:
    command = f"{sys.executable} -m kpatch show {patch} -v | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert done.stderr == ""
    assert done.stdout.startswith(str(patch))


def test_a_terminal_of_few_characters_is_no_error(patch: Path) -> None:
    done = spawn("show", patch, env={"PYTHONIOENCODING": "ascii"})
    assert (done.code, done.err) == (0, "")
    assert spawn("show", patch, "--json", env={"PYTHONIOENCODING": "ascii"}).json["method"] == "memit"


def test_ctrl_c_exits_130(tmp_path: Path) -> None:
    program = """
import sys, time
import kpatch.patch.header as header
def wait(path):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(30)
header.read_header = wait
sys.argv = ["kpatch", "show", "x.patch"]
from kpatch.__main__ import run
run()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "ready\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, "")
    assert err.startswith("error: Interrupted")


# The sink


def test_quiet_leaves_out_notes_but_not_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output().configure(quiet=True)
    out.note("a note")
    with out.task("a step", 3) as advance:
        advance(3)
    out.warn("a warning")
    out.line("data")
    assert capsys.readouterr() == ("data\n", "warning: a warning\n")


def test_verbose_tells_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output().configure(verbose=True)
    with out.task("Reading", 1_500_000, "B") as advance:
        advance(1_500_000)
    with out.task("Values", 12, "fact"):
        pass
    with out.task("Asking", 1, "prompt"):
        pass
    with out.task("Waiting", 2):
        pass
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"Reading: 1\.5 MB, 0\.0 s\nValues: 12 facts, 0\.0 s\nAsking: 1 prompt, 0\.0 s\nWaiting: 2, 0\.0 s\n", err
    )


def test_a_terminal_sees_progress_with_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Output()
    with out.task("Values [of] facts", 4, "fact") as outer:
        outer(1)
        with out.task("Inner"):
            out.note("said in between")
            time.sleep(0.15)
        outer(1)
        time.sleep(0.15)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "Values [of] facts" in shown
    assert "2 of 4 facts" in shown
    assert re.search(r"\d:\d\d|-:--", shown), "time left"
    assert "said in between" in shown


def test_nothing_is_drawn_where_no_terminal_is() -> None:
    assert run_task() == ""


def run_task() -> str:
    return python(
        "import sys\nfrom kpatch.cli.output import Output\nsys.stderr = sys.stdout\n"
        "out = Output()\nwith out.task('x', 3) as advance: advance(3)"
    )


def test_json_knows_no_nan() -> None:
    assert plain({"a": math.nan, "b": [math.inf, 1.5], "c": (Path("x"),), 3: Ran(0, "o", "e")}) == {
        "a": None,
        "b": [None, 1.5],
        "c": ["x"],
        "3": {"code": 0, "out": "o", "err": "e"},
    }


def test_small_things() -> None:
    assert [format_size(count) for count in (None, 999, 1500, 98_362_432, 5 * 10**12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "98.4 MB",
        "5000.0 GB",
    ]
    assert [counted(count, "fact") for count in (0, 1, 2000)] == ["0 facts", "1 fact", "2,000 facts"]
    assert clean("a\tb\x00") == "a\\tb\\x00"
    assert isinstance(translate(ValueError("x")), KpatchError)
    assert show.EXAMPLES.count("kpatch show") == 2
