"""What happened to a run, as lines of JSON in a file: one for each thing, for programs to read. It holds
users' tracebacks, so nobody but this user may.

Written by a thread of its own, so that no disk is ever waited for. If it can't keep up, or the disk is full, lines are
left out and counted.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_WAITING = 4096
REMEMBERED_BYTES = 1 << 20
CLOSE_LIMIT_S = 2.0

log = logging.getLogger("resilient.journal")


class Journal:
    """Appends to `path`. Raises OSError if that can't be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out = 0
        """Lines that were not written."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o600)
        os.fchmod(self._file, 0o600)  # an older version let everybody read it
        if not _ends_well(path):  # a controller was killed in the middle of a line
            os.write(self._file, b"\n")
        self._lines: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def add(self, record: Mapping[str, Any], *, allow_nan: bool = False) -> None:
        """At once, whatever the disk does."""
        try:
            self._lines.put_nowait(json.dumps(record, allow_nan=allow_nan).encode() + b"\n")
        except queue.Full:
            self.left_out += 1

    def close(self) -> None:
        """After all lines so far have been written, or a while."""
        try:
            self._lines.put(None, timeout=CLOSE_LIMIT_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_LIMIT_S)

    def _write(self) -> None:
        ended = False
        while not ended:
            lines = [self._lines.get()]
            while not self._lines.empty():
                lines.append(self._lines.get())
            ended = None in lines
            self._append([line for line in lines if line is not None])
        os.close(self._file)

    def _append(self, lines: list[bytes]) -> None:
        left = b"".join(lines)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            if not self.left_out:
                log.warning("%s: %s; such lines are left out", self.path, error)
            self.left_out += left.count(b"\n")


def remembered(path: Path) -> list[dict[str, Any]]:
    """The last records of a file, if there is one: what a controller before this one has written."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - REMEMBERED_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return [record for line in lines if (record := _read(line)) is not None]


def _ends_well(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def _read(line: bytes) -> dict[str, Any] | None:
    """None for a line that was cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None
