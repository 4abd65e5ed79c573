"""Every error a user can meet: what, where, expected and found, what to do next, and the exit code."""

from __future__ import annotations

from kpatch.text import printable


class KpatchError(Exception):
    """Base of all errors that reach a user; `exit_code` and `code` are the same with and without --json.

    `message` says what happened in one line, `where` names the file, line or tensor,
    `details` are further lines (expected and found), `hint` is the next thing to do. All of it is made safe to show.
    A parameter stands in backticks (`layers_from`); the command line shows it as its option (--layers-from).
    """

    exit_code = 1
    code = "failed"

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        details: tuple[str, ...] | list[str] = (),
        hint: str | None = None,
    ) -> None:
        self.message = printable(message)
        self.where = None if where is None else printable(where)
        self.details = tuple(printable(detail) for detail in details)
        self.hint = None if hint is None else printable(hint)
        super().__init__(self.message)


class CheckFailed(KpatchError):
    """The answer is no: a check, a threshold or `verify` failed."""

    exit_code = 1
    code = "check_failed"


class BadInput(KpatchError):
    """Bad usage or bad input: a file, YAML, a model or a corpus."""

    exit_code = 2
    code = "bad_input"


class Refused(KpatchError):
    """Refused for safety: wrong base, conflict, locked, or data would be lost."""

    exit_code = 3
    code = "refused"


class Damaged(KpatchError):
    """A corrupt patch, or a checkpoint that was interrupted or modified."""

    exit_code = 4
    code = "damaged"
