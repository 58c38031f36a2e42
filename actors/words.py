"""Status words: what a rank shows its keeper through shared memory, without a message.

One small file per rank under /dev/shm. The rank alone writes; each word is eight bytes, aligned, so a
reader never sees half of one. A rank that is stopped or hung still shows where it stood.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

from .folders import make_private

ACTIVITIES = ("starting", "computing", "waiting", "paused", "ended")
_LAYOUT = struct.Struct("<qqqqd")
"""Work counter, activity, step, generation, longest time between two movements in seconds."""
_BYTES = 64


class Words:
    """The rank's side."""

    def __init__(self, path: Path) -> None:
        make_private(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        os.ftruncate(descriptor, _BYTES)
        self._map = mmap.mmap(descriptor, _BYTES)
        os.close(descriptor)
        self._work, self._longest_s, self._moved_at = 0, 0.0, time.monotonic()
        self._activity, self._step, self._generation = "starting", 0, 0

    def moved(self, activity: str, step: int, generation: int) -> None:
        """A piece of work is done."""
        now = time.monotonic()
        if self._activity == "computing" and self._work > 1:
            self._longest_s = max(self._longest_s, now - self._moved_at)
        self._work, self._moved_at = self._work + 1, now
        self._activity, self._step, self._generation = activity, step, generation
        self._write()

    def activity(self, activity: str) -> None:
        self._activity, self._moved_at = activity, time.monotonic()
        self._write()

    def _write(self) -> None:
        _LAYOUT.pack_into(
            self._map,
            0,
            self._work,
            ACTIVITIES.index(self._activity),
            self._step,
            self._generation,
            self._longest_s,
        )


def read_words(path: Path) -> tuple[int, str, int, int, float] | None:
    """(work, activity, step, generation, longest_s) as the rank last wrote them; None without a file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) < _LAYOUT.size:
        return None
    work, activity, step, generation, longest_s = _LAYOUT.unpack_from(raw)
    return work, ACTIVITIES[activity], step, generation, longest_s
