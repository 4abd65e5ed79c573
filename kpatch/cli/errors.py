"""The one boundary where errors become messages and exit codes; nothing below it prints or exits."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from kpatch import distributed
from kpatch.cache import is_full
from kpatch.cli.output import Output, clean, paint
from kpatch.errors import BadInput, KpatchError

INTERRUPTED = 130

EXIT_CODES = (
    ("0", "done"),
    ("1", "the answer is no: a check, a threshold or `verify` failed"),
    ("2", "bad usage or bad input: file, YAML, model, corpus"),
    ("3", "refused for safety: wrong base, conflict, locked, would lose data"),
    ("4", "damaged: corrupt patch, interrupted or modified checkpoint"),
    ("130", "interrupted"),
)


class Interrupted(KpatchError):
    """Ctrl-C."""

    exit_code = INTERRUPTED
    code = "interrupted"


class Usage(BadInput):
    """An option or argument that the command does not have, or lacks."""

    code = "usage"


class Internal(KpatchError):
    """An error that no one foresaw."""

    code = "internal"


def guarded(call: Callable[[], Any], out: Output) -> int:
    """Run `call` and give its exit code; whatever it raises is reported once, on stderr or as a JSON object."""
    try:
        code = call()
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        distributed.finish()
        out.finish()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`): nothing can be printed, not by the interpreter either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1
    except BaseException as error:
        return _print_error(error, out)


def _print_error(error: BaseException, out: Output) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        return Usage.exit_code
    if os.environ.get("KPATCH_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    with distributed.failing(translate(error)) as (known, mine):
        if mine and out.json:
            out.finish(_as_json(known, out.spell))
        elif mine:
            print(_as_text(known, out.spell), file=sys.stderr, flush=True)
    return known.exit_code


def _as_json(error: KpatchError, spell: Callable[[str], str]) -> dict[str, Any]:
    return {
        "code": error.code,
        "message": spell(error.message),
        "hint": error.hint and spell(error.hint),
        "where": error.where,
        "details": [spell(detail) for detail in error.details],
    }


def _as_text(error: KpatchError, spell: Callable[[str], str]) -> str:
    """The message for people: what, where, expected and found, what to do next."""
    lines = [f"{paint('error:', '31')} {clean(spell(error.message))}"]
    if error.where and error.where not in error.message:
        lines.append(f"  in {clean(error.where)}")
    lines += [f"  {clean(spell(detail))}" for detail in error.details]
    if error.hint:
        lines.append(f"{paint('hint:', '36')} {clean(spell(error.hint))}")
    return "\n".join(lines)


def translate(error: BaseException) -> KpatchError:
    """Any exception as one that a user can read."""
    if isinstance(error, KpatchError):
        return error
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return Interrupted("Interrupted", hint="what was finished is kept; run the same command again to continue")
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _usage(error)
    if is_full(error):
        where = getattr(error, "filename", None)
        return KpatchError("No space left on the disk", where=where, hint="free some space and run it again")
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return KpatchError(
            "Out of memory",
            details=[_first_line(error)],
            hint="give --memory a smaller budget, or use a smaller --dtype or model",
        )
    if isinstance(error, OSError) and error.strerror:
        kind = BadInput if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError) else KpatchError
        return kind(error.strerror, where=None if error.filename is None else str(error.filename))
    return Internal(
        "Something went wrong inside kpatch; this is a bug",
        details=[f"{type(error).__name__}: {_first_line(error)}"],
        hint="run it again with KPATCH_DEBUG=1 to see where, and report that",
    )


def _usage(error: Any) -> KpatchError:
    """Typer's own errors; recognized by their shape, because the library they come from is Typer's private matter."""
    context = getattr(error, "ctx", None)
    path = str(getattr(context, "command_path", "kpatch"))
    message = str(error.format_message()).strip().replace("\n", " ")
    return Usage(message, hint=f"`{path} --help` shows what it takes")


def _out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
