"""Memory for parity blocks that is used again: to touch pages for the first time costs ten times a copy."""

from __future__ import annotations

import contextlib
import itertools
import threading
from pathlib import Path

from snapshot.parity import ParityFile


class ParityPool:
    """Free files of one folder. There are never more than were needed at once, and none that nobody can use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._free: list[ParityFile] = []
        self._serials = itertools.count()

    def take(self, block_bytes: int) -> ParityFile:
        """The smallest that a block of this length fits into, or a new one. Raises NoRoom."""
        with self._lock:
            fitting = sorted((file for file in self._free if file.fits(block_bytes)), key=lambda file: file.held_bytes)
            if fitting:
                self._free.remove(fitting[0])
                return fitting[0]
            # They are of another time; their memory may be what is missing.
            for file in self._free:
                file.unlink()
            self._free.clear()
        while True:
            with contextlib.suppress(FileExistsError):  # a former keeper's
                return ParityFile.create(self._folder / f"parity-{next(self._serials)}", block_bytes)

    def give(self, file: ParityFile) -> None:
        """It is free, and no parity block any more."""
        file.invalidate()
        with self._lock:
            self._free.append(file)

    def held_bytes(self) -> int:
        with self._lock:
            return sum(file.held_bytes for file in self._free)
