"""How the command line speaks: tables for people, one JSON document for programs, one clear line for errors."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from snapshot.core.spelling import ManifestError
from snapshot.files import StorageError
from snapshot.stored import RottenCheckpoint

from .errors import ResilientError

FOUND_BAD, WRONG_USE = 1, 2
_PIPE_COLUMNS = 10_000
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("kmgt", 1)
    for kind, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(rf"(?P<number>\d+(\.\d+)?) *(?P<unit>{'|'.join(unit for unit in _UNITS if unit)})?", re.IGNORECASE)


class Answer:
    """What a command has to say. It is said at the end of `answering`, all at once."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.document: dict[str, Any] = {}
        self.good = True
        terminal = Console()
        # What goes into a file or a pipe is not folded.
        self._console = terminal if terminal.is_terminal else Console(width=_PIPE_COLUMNS)
        self._tables: list[Table | Text] = []

    def say(self, text: str) -> None:
        self._tables.append(Text(text))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
        """right: columns of numbers."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold", justify="right" if column in right else "left")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._tables.append(table)

    def finish(self) -> None:
        if self.as_json:
            print(json.dumps(self.document, allow_nan=False))
            return
        with self._console.capture() as captured:
            for table in self._tables:
                self._console.print(table)
        for line in captured.get().splitlines():
            print(line.rstrip())


@contextlib.contextmanager
def answering(as_json: bool) -> Iterator[Answer]:
    """Ends the process with 1 if the answer is not good, and after one line for what is wrong with 1 or 2."""
    answer = Answer(as_json)
    try:
        yield answer
    except BrokenPipeError:
        raise  # click knows what to do
    except (ManifestError, RottenCheckpoint, StorageError, ResilientError, OSError) as error:
        _fail(as_json, str(error), FOUND_BAD)
    except (ValueError, TypeError) as error:
        _fail(as_json, str(error), WRONG_USE)
    answer.finish()
    sys.exit(0 if answer.good else FOUND_BAD)


def _fail(as_json: bool, message: str, status: int) -> NoReturn:
    line = " ".join(message.split())
    if as_json:
        print(json.dumps({"error": line}))
    print(f"Error: {line}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """On stderr, if that is a terminal. Called with bytes done and bytes in all."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def end_in_order() -> None:
    """SIGTERM and SIGHUP as Ctrl-C: everything that was started is ended on the way out."""
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, _interrupted)


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def in_bytes(count: int | None) -> str:
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def in_byte_count(size: str) -> int | None:
    """Of "512", "500MiB" or "30GB"; None for anything else."""
    found = _SIZE.fullmatch(size.strip())
    return None if found is None else int(float(found["number"]) * _UNITS[(found["unit"] or "").lower()])


def short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
