"""The terminal: tables, examples and progress, in characters that the terminal can show.

`make_progress(stream)` is a bar where somebody watches and plain lines, few of them, where a log is written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self, TextIO

from rich.box import ASCII, SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from tutelage.records import Kind
from tutelage.report.data import ShownExample
from tutelage.report.look import emphasis, visible
from tutelage.report.tables import Table, duration, plural, spoken

KIND_STYLES = {
    "scaffold": "",
    "system": "magenta",
    "user": "blue",
    "assistant": "green",
    "reasoning": "yellow",
    "tool_call": "cyan",
    "tool_result": "bright_black",
    "stop": "red",
    "left_out": "italic",
}
WEIGHT_STYLES = {"none": "dim", "light": "", "full": "bold", "heavy": "bold underline"}
SECONDS_BETWEEN_LINES = 5.0

_PLAIN = str.maketrans({"−": "-", "–": "-", "…": "...", "→": "->", "·": ".", "‹": "<", "›": ">"})


def make_console(stream: TextIO | None = None, *, width: int | None = None) -> Console:
    """A console on a stream; a log has no width, so tables keep theirs."""
    stream = stream or sys.stdout
    if width is None and not stream.isatty():
        width = 200
    return Console(file=stream, width=width, highlight=False, soft_wrap=False, emoji=False, markup=False)


def safe(text: str, console: Console) -> str:
    """The text in characters that the console's encoding has.

    >>> import io
    >>> safe("−0.4 → ✓", make_console(io.TextIOWrapper(io.BytesIO(), encoding="ascii")))
    '-0.4 -> ?'
    """
    text = visible(text)
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(console.encoding, "replace").decode(console.encoding)
    return text


def print_table(table: Table, console: Console | None = None) -> None:
    """Prints a table: numbers to the right, the total in bold."""
    console = console or make_console()
    is_utf8 = console.encoding.startswith("utf")
    out = RichTable(
        title=Text(safe(table.caption, console), "bold"),
        title_justify="left",
        box=SIMPLE_HEAD if is_utf8 else ASCII,
        pad_edge=False,
        show_edge=False,
        header_style="dim",
    )
    for column in table.columns:
        out.add_column(
            Text(safe(column.label, console)),
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number,
            overflow="fold",
        )
    for row, texts in zip(table.rows, table.texts(), strict=True):
        out.add_row(*(Text(safe(text, console)) for text in texts), style="bold" if row[0] == "" else "")
    console.print(out)
    console.print()


def print_examples(examples: Iterable[ShownExample], console: Console | None = None) -> None:
    """Prints examples as the model saw them, and once what the colours mean."""
    console = console or make_console()
    shown = list(examples)
    for example in shown:
        seen = "once" if example.num_visits == 1 else f"{example.num_visits} times"
        facts = f"{example.task}, {plural(example.num_tokens, 'token')}, {example.num_supervised:,} learned, seen {seen}"
        console.print(Text(safe(example.row_id, console), "bold"), Text(safe(facts, console), "dim"))
        console.print(example_text(example, console), soft_wrap=True)
        console.print()
    console.print(legend() if shown else Text("no example fits"))


def example_text(example: ShownExample, console: Console) -> Text:
    """The runs of an example: colour by kind, a name where the kind changes, bold where it is learned, dim where it is not."""
    out, last = Text(), ""
    for run in example.runs:
        style = f"{KIND_STYLES[run.kind]} {WEIGHT_STYLES[emphasis(run.weight)]}".strip()
        if run.kind not in (last, "scaffold", "left_out"):
            out.append(f"[{spoken(run.kind)}]", style=f"{KIND_STYLES[run.kind]} reverse".strip())
        out.append(safe(run.text, console), style=style)
        last = run.kind
    return out


def legend() -> Text:
    """What colours and emphasis mean."""
    out = Text()
    for kind in Kind:
        name = kind.name.lower()
        out.append(spoken(name), style=KIND_STYLES[name]).append("  ")
    return (
        out.append("weight 0", "dim").append("  below 1  ").append("1", "bold").append("  ").append("above 1", "bold underline")
    )


class BarProgress:
    """One bar at a time on a terminal: done of total, what stands beside it, elapsed and remaining time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Begins a bar; the one before stays as it ended."""
        self.close()
        count = "{task.completed:,.0f} of {task.total:,.0f}" if total is not None else "{task.completed:,.0f}"
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn(f"{count} {safe(unit, self._console)}", markup=False),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
        )
        self._bar.start()
        self._task = self._bar.add_task(safe(label, self._console), total=total, text="")

    def advance(self, amount: int = 1, text: str = "") -> None:
        """Moves the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)
            if text:
                self._bar.update(self._task, text=safe(text, self._console))

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(Text(safe(text, self._console)))

    def close(self) -> None:
        """Leaves the bar as it is and frees the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


class LineProgress:
    """Lines for a log: one when something begins, then at most one every few seconds, and one at a slow end."""

    def __init__(self, stream: TextIO, *, seconds_between: float = SECONDS_BETWEEN_LINES) -> None:
        self._console = make_console(stream)
        self._stream = stream
        self._seconds_between = seconds_between
        self._label, self._unit, self._text = "", "", ""
        self._total: int | None = None
        self._done = self._told = 0
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Begins something new."""
        self.close()
        self._label, self._total, self._unit, self._text = label, total, unit, ""
        self._done = self._told = 0
        self._started = self._last = time.monotonic()

    def advance(self, amount: int = 1, text: str = "") -> None:
        """Counts, and says so when the last line is old enough."""
        self._done += amount
        self._text = text or self._text
        if time.monotonic() - self._last >= self._seconds_between:
            self._say()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._write(text)

    def close(self) -> None:
        """Says how something slow ended."""
        if self._label and self._done > self._told and time.monotonic() - self._started >= self._seconds_between:
            self._say()
        self._label = ""

    def _say(self) -> None:
        self._last, self._told = time.monotonic(), self._done
        spent = self._last - self._started
        parts = [f"{self._done:,}{'' if self._total is None else f' of {self._total:,}'} {self._unit}".strip(), self._text]
        is_told = self._text.endswith(" left")  # training estimates by its own clock, which leaves measuring out
        if self._total is not None and 0 < self._done < self._total and not is_told:
            parts.append(f"{duration(spent / self._done * (self._total - self._done))} left")
        self._write(f"{self._label}: {', '.join(part for part in parts if part)}")

    def _write(self, text: str) -> None:
        self._stream.write(safe(text, self._console) + "\n")
        self._stream.flush()


def make_progress(stream: TextIO) -> BarProgress | LineProgress:
    """A bar where the stream is a terminal that can redraw, else plain lines. Both are context managers."""
    console = Console(file=stream, highlight=False, emoji=False, markup=False)
    return BarProgress(console) if console.is_terminal and not console.is_dumb_terminal else LineProgress(stream)
