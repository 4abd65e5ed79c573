"""The one place that writes: data to stdout, everything else to stderr, for people or as one JSON object."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kpatch.reporter import Advance
from kpatch.text import counted, format_size, printable

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.text import Text

SCHEMA_VERSION = 1
_WORTH_A_LINE = 2.0  # seconds: a step that took longer leaves a line behind
_UNWRAPPED = 140  # columns of a table that goes to a file or a pipe

Cell = str | int | float | None


def clean(text: object) -> str:
    """Text of a file or a model made safe for one line of a terminal: no control or reordering characters."""
    return printable(str(text).replace("\n", "\\n").replace("\t", "\\t"))


class Output:
    """What commands print through; also the Reporter that the layers below them speak to.

    Human mode prints text and tables as they come. JSON mode keeps `result` and prints it as one object at the end.
    Quiet leaves notes and progress out; warnings and data stay.
    """

    def __init__(self) -> None:
        self.spell: Callable[[str], str] = str  # shows parameters in backticks as the options of the running command
        self.configure()

    def configure(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> Output:
        """Set the modes; returns itself."""
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self._result: dict[str, Any] = {}
        self._progress: Progress | None = None
        self._tasks = 0
        return self

    # Data

    def result(self, data: Mapping[str, Any]) -> None:
        """The command's JSON object, or more keys of it; people do not see it."""
        self._result.update(data)

    def line(self, text: str = "") -> None:
        """One line of data for people."""
        if not self.json:
            print("\n".join(printable(part) for part in text.split("\n")), file=sys.stdout)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Cell]], right: Sequence[int] = ()) -> None:
        """A table for people; `right` are the columns of numbers."""
        if self.json or not rows:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _UNWRAPPED
        console = Console(file=sys.stdout, width=width, highlight=False, emoji=False)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for number, header in enumerate(headers):
            side = "right" if number in right else "left"
            table.add_column(Text(header), justify=side, no_wrap=number in right, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(Text("" if cell is None else clean(cell)) for cell in row))
        console.print(table)

    def screen(self) -> tuple[bool, int]:
        """Whether stdout shows colours, and how many columns it has."""
        from rich.console import Console

        if self.json:
            return False, _UNWRAPPED
        console = Console(file=sys.stdout)
        wide = sys.stdout.isatty() or bool(os.environ.get("COLUMNS"))
        return console.color_system is not None and not console.no_color, console.width if wide else _UNWRAPPED

    def drawing(self, lines: Sequence[Text]) -> None:
        """Coloured lines for people, never wrapped."""
        if self.json:
            return
        from rich.console import Console

        console = Console(file=sys.stdout, highlight=False, emoji=False)
        for line in lines:
            console.print(line, soft_wrap=True)

    def finish(self, error: Mapping[str, Any] | None = None) -> None:
        """Print the JSON object, with `error` where the command failed; the last thing that a run does."""
        if self.json:
            data = {"schema_version": SCHEMA_VERSION, **self._result, **({"error": error} if error else {})}
            print(json.dumps(plain(data), indent=2, allow_nan=False), file=sys.stdout)
        sys.stdout.flush()

    # Everything else

    def note(self, message: str) -> None:
        if not self.quiet:
            self._print(self.spell(message))

    def warn(self, message: str) -> None:
        self._print(f"{paint('warning:', '33')} {clean(self.spell(message))}", cleaned=True)

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        start = time.monotonic()
        if self.quiet or not sys.stderr.isatty():
            yield lambda amount: None
        else:
            with self._bar(description, total, unit) as advance:
                yield advance
        seconds = time.monotonic() - start
        if self.verbose or seconds >= _WORTH_A_LINE:
            amount = f": {_amount(total, unit)}" if total else ""
            self.note(f"{description}{amount}, {seconds:.1f} s")

    @contextmanager
    def _bar(self, description: str, total: int | None, unit: str) -> Iterator[Advance]:
        """A line with time left; steps inside steps share one display."""
        if self._progress is None:
            self._progress = _new_progress()
            self._progress.start()
        progress = self._progress
        self._tasks += 1
        task = progress.add_task(clean(description), total=total, unit=unit)
        try:
            yield lambda amount: progress.advance(task, amount)
        finally:
            progress.remove_task(task)
            self._tasks -= 1
            if self._tasks == 0:
                progress.stop()
                self._progress = None

    def _print(self, message: str, cleaned: bool = False) -> None:
        text = message if cleaned else clean(message)
        if self._progress is not None:
            from rich.text import Text

            self._progress.console.print(Text.from_ansi(text), soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


_OUTPUT = Output()


def output() -> Output:
    """The sink of this process."""
    return _OUTPUT


def begin(json: bool, quiet: bool, verbose: bool) -> Output:
    """Set the sink's modes at the start of a command."""
    return _OUTPUT.configure(json=json, quiet=quiet, verbose=verbose)


def paint(text: str, code: str, stream: TextIO | None = None) -> str:
    """`text` in a colour where the stream is a terminal that wants colours."""
    stream = stream or sys.stderr
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[1;{code}m{text}\x1b[0m"


def plain(value: Any) -> Any:
    """`value` as JSON knows it: dataclasses and paths spelt out, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def percent(fraction: float | None) -> str:
    """A rate or probability, 0 to 1, as people read it: 93.3 %."""
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def _amount(total: int, unit: str) -> str:
    """All that a step does: 1 prompt, 2,000 prompts, 1.2 MB."""
    return format_size(total) if unit == "B" else counted(total, unit)


def _new_progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            unit = str(task.fields.get("unit", ""))
            if task.total is None:
                return Text("")
            done, total = int(task.completed), int(task.total)
            return Text(f"{format_size(done) if unit == 'B' else f'{done:,}'} of {_amount(total, unit)}")

    console = Console(file=sys.stderr, highlight=False, emoji=False)
    description = TextColumn("{task.description}", markup=False)
    left = TimeRemainingColumn(elapsed_when_finished=True)
    return Progress(
        description, BarColumn(bar_width=24), Amount(), left, console=console, transient=True, redirect_stdout=False
    )
