"""The Typer application: which commands there are, in which order, and how a run starts and ends."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from kpatch import distributed
from kpatch.cli.errors import EXIT_CODES, guarded
from kpatch.cli.options import option_names, parser_of, with_options
from kpatch.cli.output import begin, output
from kpatch.errors import BadInput

_CODES = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES)

app = typer.Typer(
    name="kpatch",
    help="Knowledge patches for language models: small files that change facts,"
    " to be reviewed, applied, stacked and taken back.",
    epilog=f"\b\nExit codes:\n{_CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from kpatch._version import __version__

        print(f"kpatch {__version__}")
        raise typer.Exit


@app.callback()
def _kpatch(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


_COMMANDS = (
    "trace make show verify apply revert status log recover stack diff export ask eval probe import_ lint cov tune"
    " train memories models"
)
_SHARED = ("trace", "make", "cov")  # what several processes can do together
for _name in _COMMANDS.split():
    _module = import_module(f"kpatch.cli.commands.{_name}")
    app.command(_name.rstrip("_"), epilog=_module.EXAMPLES)(_module.command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and answer its exit code. Never raises, but for what a second Ctrl-C may do."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = given[: given.index("--")] if "--" in given else given
    out = begin(
        json="--json" in options, quiet=False, verbose=False
    )  # for errors before the command reads its options
    out.spell = lambda text: with_options(text, option_names(app, _command(options))) if "`" in text else text
    with warnings.catch_warnings():
        if "-v" not in options and "--verbose" not in options:
            warnings.simplefilter("ignore")  # of libraries: nothing a user of kpatch can act on
        if distributed.launched():
            return _ranked(given, options)
        return guarded(lambda: _run(given), out)


def _command(options: list[str]) -> str | None:
    return next((word for word in options if not word.startswith("-")), None)


def _run(given: list[str]) -> Any:
    return parser_of(app)(args=given, prog_name="kpatch", standalone_mode=False)


def _alone(given: list[str], options: list[str]) -> Any:
    if not {"--help", "-h", "--version"} & set(options):
        raise BadInput(
            "This command runs in one process",
            details=[f"several can share {', '.join(_SHARED)}"],
            hint="run it without torchrun",
        )
    return _run(given)


def _ranked(given: list[str], options: list[str]) -> int:
    """One command line in one of several processes: work that can be shared is, the rest is rank 0's or refused."""
    if _command(options) not in _SHARED or {"--help", "-h"} & set(options):
        if distributed.rank():
            return 0
        return guarded(lambda: _alone(given, options), output())

    def call() -> Any:
        distributed.join()
        return _run(given)

    try:
        return guarded(call, output())
    finally:
        distributed.leave()
