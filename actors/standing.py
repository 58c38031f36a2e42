"""Where a keeper stands with its node's snapshots, shown to the ranks through a file in shared memory.

Four words of eight bytes, each written at once: no reader sees half of one. Three of them are each a generation and
a step of it; a word of another generation says nothing to the members of this one. The last is an ordinal.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from pathlib import Path
from typing import Literal, NamedTuple

from snapshot.core.inventory import SnapshotKey
from snapshot.core.lifecycle import Ordinal

NAME = "keeper.standing"
NONE = -1
_STEP_BITS = 40
_WORDS = struct.Struct("<qqqq")
_PLACES = ("protected", "taken_up", "given_up", "settled")


class Standing(NamedTuple):
    """Steps of one generation, -1 for none; `settled` is about all."""

    protected: int
    """The newest snapshot that is protected, from the node's point of view."""
    taken_up: int
    """The newest one whose protection has begun: older ones that are not protected never will be."""
    given_up: int
    """The last one that could not be protected."""
    settled: Ordinal | None
    """The newest snapshot that was to be made durable and needs its slots no more, whatever came of it."""


class StandingFile:
    """The keeper's side. The same file for all keepers of a node, one after another: it stays mapped."""

    def __init__(self, folder: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(folder / NAME, flags, 0o600)
        self._lock = threading.Lock()
        self._open = True
        if os.fstat(self._descriptor).st_size < _WORDS.size:
            self._write("settled", NONE)
        self.clear()

    def clear(self) -> None:
        for place in ("protected", "taken_up", "given_up"):
            self._write(place, NONE)

    def show(self, place: Literal["protected", "taken_up", "given_up"], key: SnapshotKey) -> None:
        self._write(place, key.generation << _STEP_BITS | key.step)

    def _write(self, place: str, packed: int) -> None:
        with self._lock:
            if self._open:
                os.pwrite(self._descriptor, struct.pack("<q", packed), 8 * _PLACES.index(place))

    def close(self) -> None:
        with self._lock:
            if self._open:
                os.close(self._descriptor)
            self._open = False


def show_settled(folder: Path, ordinal: Ordinal) -> None:
    """By whoever makes snapshots durable, in another process than the keeper's. Nothing if the folder has gone."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.pwrite(descriptor, struct.pack("<q", ordinal.packed()), 8 * _PLACES.index("settled"))
        finally:
            os.close(descriptor)


def read_standing(folder: Path, generation: int) -> Standing:
    try:
        words = _WORDS.unpack((folder / NAME).read_bytes())
    except (FileNotFoundError, struct.error):  # no keeper yet, or none any more
        words = (NONE, NONE, NONE, NONE)
    protected, taken_up, given_up = (_step(word, generation) for word in words[:3])
    return Standing(protected, taken_up, given_up, Ordinal.unpacked(words[3]))


def read_settled(folder: Path) -> Ordinal | None:
    """The newest snapshot that was to be made durable and needs its slots no more."""
    return read_standing(folder, NONE).settled


def _step(word: int, generation: int) -> int:
    return word & (1 << _STEP_BITS) - 1 if word >= 0 and word >> _STEP_BITS == generation else NONE
