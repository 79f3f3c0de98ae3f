"""Terminal output: messages and progress on stderr, data on stdout. Only this file imports rich."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from dinocli.core.distributed import rank
from dinocli.core.errors import visible

# soft_wrap prints a long path without line breaks, so that it can be copied. Only rank 0 prints messages and data;
# any rank may print an error.
_quiet = rank() > 0
_words = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, quiet=_quiet)
_data = Console(highlight=False, soft_wrap=True, emoji=False, quiet=_quiet)
_mistakes = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
_NAME = 20  # characters
_BAR, _SHORTEST_BAR = 40, 5  # columns of a terminal
_SAVED = 8  # written files to name
_PLAIN_EVERY = 10.0  # seconds between lines if stderr is not a terminal


def say(text: str) -> None:
    """Print a message, on stderr."""
    _words.print(_escape(text))


def notes(lines: Iterable[str]) -> None:
    """Print each distinct line as a note, on stderr."""
    for line in dict.fromkeys(lines):
        say(f"note: {line}")


def skipped(reasons: Mapping[str, str] | Mapping[Path, str]) -> None:
    """Print each skipped item with its reason, on stderr."""
    for what, reason in reasons.items():
        say(f"note: skipped {what}: {reason}")


def saved(paths: Iterable[object], then: str = "") -> None:
    """Print the written files and folders, on stderr, as the last line of a command that writes, and what to type next.

    Args:
        paths: Written files and folders; without any, nothing is printed of them.
        then: Command that uses them. If empty, none is suggested.
    """
    names = list(dict.fromkeys(map(str, paths)))
    if names:
        more = f" and {len(names) - _SAVED} more" if len(names) > _SAVED else ""
        say(f"results saved to {', '.join(names[:_SAVED])}{more}")
    if then:
        say(f"next: {then}")


def error(message: str, hint: str) -> None:
    """Print an error and its hint, on stderr."""
    _mistakes.print(f"[bold red]error:[/] {_escape(message)}\n[bold cyan]hint:[/] {_escape(hint)}")


def _escape(text: str) -> str:
    """Escape rich markup and control characters, which file names may contain."""
    return escape(visible(text))


def out(text: str) -> None:
    """Print a line of data, on stdout; escape control characters and those that the encoding lacks."""
    if _quiet:
        return
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(visible(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")


def out_json(value: Any) -> None:
    """Print a value as JSON, on stdout."""
    # json.dumps escapes non-ASCII characters and all control characters except DEL.
    for line in json.dumps(value, indent=2).replace("\x7f", "\\u007f").splitlines():
        out(line)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, lines: bool = False
) -> None:
    """Print a table, on stdout, with columns of numbers right-aligned, except the first column.

    Args:
        columns: Header of each column.
        rows: Cells of each row. With `lines`, a cell may contain newlines.
        title: Line printed above the table. If None, there is no title.
        lines: Draw lines between rows.
    """
    if title:
        _data.print(_escape(title), style="bold")
    drawn = Table(show_lines=lines)
    for i, name in enumerate(columns):
        numbers = all(row[i].replace(".", "").replace("-", "").replace("%", "").isdigit() for row in rows if row[i])
        # A row's name stays on one line, so that it can be copied, unless it is long, such as a path.
        whole = i == 0 and all(len(visible(row[0])) <= _NAME for row in rows)
        drawn.add_column(_escape(name), justify="right" if i and numbers else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        drawn.add_row(*("\n".join(map(_escape, cell.split("\n") if lines else [cell])) for cell in row))
    _data.print(drawn, soft_wrap=False)


class Advance(Protocol):
    """Progress callback."""

    def __call__(self, done: int, note: str = "") -> None:
        """Report that `done` items of the total are complete, with a `note` beside the bar."""


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Advance]:
    """Show a progress bar on a terminal, else print a line every 10 s. Include the rate if the unit is `images`.

    The total is 0 if it is unknown.

    The first report may count work of an earlier call, such as of a resumed run. The rate and the time left ignore it.
    """
    start, first = time.monotonic(), -1

    def format_note(done: int, note: str) -> str:
        nonlocal first
        first = first if first >= 0 else done - 1
        rate = f"{(done - first) / max(time.monotonic() - start, 1e-9):.0f} images/s"
        return "  ".join(part for part in (note, rate if unit == "images" else "") if part)

    if _words.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(None, table_column=Column(max_width=_BAR)),  # fills the width left by the text
            TextColumn(("{task.completed}/{task.total} " if total else "{task.completed} ") + unit),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, console=_words) as bar:
            # In a narrow terminal, shorten the name and the note, not the time left.
            fixed = len(f"  {total}/{total} {unit}  00:00:00 left ") + _SHORTEST_BAR
            short = _escape(what[: max(8, _words.width - fixed)])
            task = bar.add_task(short, total=total or None, note="")

            def update(done: int, note: str = "") -> None:
                if first < 0:
                    bar.reset(task, completed=done - 1)
                text = _fit(format_note(done, note), _words.width - fixed - len(short))
                bar.update(task, completed=done, note=_escape(text))

            yield update
        return
    last = start

    def print_line(done: int, note: str = "") -> None:
        nonlocal last
        now, said = time.monotonic(), format_note(done, note)
        if (done < total or not total) and now - last < _PLAIN_EVERY:
            return
        last = now
        left = duration((now - start) * (total - done) / max(1, done - first))
        parts = (f"{what} {done}{f'/{total}' if total else ''} {unit}", said, f"{left} left" if done < total else "")
        say("  ".join(part for part in parts if part))

    yield print_line


def _fit(note: str, room: int) -> str:
    """Drop parts from the end of a note until it fits into `room` characters."""
    while len(note) > room:
        note = note.rpartition("  ")[0]
        if not note:
            break
    return note


def duration(seconds: float) -> str:
    """Format a number of seconds, such as `5 min 3 s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
