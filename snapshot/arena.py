"""Slots as files in shared memory: a rank writes them, its keeper seals, checks and reads them.

The files outlive the processes: what was committed when a rank or a keeper was killed is found again by the
next keeper. See `snapshot.slot` for what is in them. No torch here: keepers must start fast.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from snapshot import slot as layout
from snapshot.room import NoRoom, check_room, free_bytes, reserve
from snapshot.slot import NotASlot, Preamble, RottenSlot, SlotChanged, SlotError, SlotHead

__all__ = [
    "FoundSlot",
    "NoRoom",
    "NotASlot",
    "RottenSlot",
    "Slot",
    "SlotChanged",
    "SlotError",
    "SlotHead",
    "SlotView",
    "check_room",
    "find_slots",
    "free_bytes",
    "required_bytes",
]

SlotState: TypeAlias = Literal["open", "committed", "sealed"]

# Seven counters in the head may grow to 19 digits each.
_GROWTH_BYTES = 7 * 19


def required_bytes(head: SlotHead) -> int:
    """The capacity of a slot that has room for this head and its payload, also with later counters."""
    return layout.padded(layout.image_bytes(head) + layout.padded(_GROWTH_BYTES))


class Slot:
    """The rank's side of one slot. One thread at a time."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self._mapped = mapped
        self._buffer = memoryview(mapped)
        self._word: int | None = None

    @classmethod
    def create(cls, path: Path, capacity_bytes: int) -> Slot:
        """A new file of mode 0600, all of its pages reserved and present; other threads run meanwhile.

        Raises NoRoom, saying what to change, and FileExistsError. The caller owes `close`, and `unlink` when
        nobody needs the file any more.
        """
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes: {capacity_bytes} is not positive")
        return cls(path, reserve(path, layout.padded(capacity_bytes)))

    @property
    def capacity_bytes(self) -> int:
        return len(self._buffer)

    @property
    def memory(self) -> memoryview:
        """All of it, to be registered with a device. Valid until `close`."""
        return self._buffer

    def begin(self, head: SlotHead) -> memoryview:
        """Invalidate the slot and write all but the payload. The buffer that the payload goes into, uninitialised.

        The buffer begins on a page and is valid until `close`. Raises ValueError, and changes nothing, if the
        payload does not fit. The caller owes that no keeper is sealing or reading the slot.
        """
        needed_bytes = layout.image_bytes(head)
        if needed_bytes > self.capacity_bytes:
            raise ValueError(f"{self.path}: the image has {needed_bytes} bytes, the slot {self.capacity_bytes}")
        payload_at, self._word = layout.write_front(self._buffer, head)
        return self._buffer[payload_at : payload_at + head.payload_bytes]

    def commit(self) -> None:
        """The payload is complete: from this moment on the slot holds a snapshot, even if this process dies."""
        assert self._word is not None, "commit without begin"
        layout.write_commit(self._buffer, self._word)
        self._word = None

    def invalidate(self) -> None:
        """From this moment on the slot holds nothing."""
        self._word = None
        layout.clear_words(self._buffer)

    def unlink(self) -> None:
        """Remove the file; who has mapped it keeps it."""
        with contextlib.suppress(FileNotFoundError):  # a keeper sweeps too
            self.path.unlink()

    def close(self) -> None:
        """Unmap it, or leave that to whoever still holds a payload buffer."""
        _close(self._buffer, self._mapped)


class SlotView:
    """The keeper's side of one slot: of a file, or of an image that was decoded into memory.

    Every answer is about the moment of the call, for the rank may begin anew at any time. All methods raise
    RottenSlot if the slot was committed but preamble, head or sums are damaged.
    """

    def __init__(self, buffer: memoryview | bytes | bytearray, name: str, mapped: mmap.mmap | None = None) -> None:
        """buffer: the image, perhaps with more behind it; writable if `seal` is to be called."""
        self.name = name
        self._mapped = mapped
        self._buffer = memoryview(buffer)
        self._readonly = self._buffer.toreadonly()
        layout.read_preamble(self._readonly, name)

    @classmethod
    def open(cls, path: Path) -> SlotView:
        """Raises NotASlot for a file that is being created, is too short or holds anything else."""
        with contextlib.closing(_Descriptor(path)) as file:
            mapped = file.map()
        try:
            return cls(memoryview(mapped), str(path), mapped)
        except SlotError:
            _close(memoryview(b""), mapped)
            raise

    @property
    def state(self) -> SlotState:
        """An empty slot is open, too."""
        preamble = self._preamble()
        if preamble is None:
            return "open"
        return "sealed" if preamble.seal else "committed"

    @property
    def committed(self) -> bool:
        """Whether it holds a snapshot, sealed or not."""
        return self._preamble() is not None

    @property
    def sealed(self) -> bool:
        return self.state == "sealed"

    def head(self) -> SlotHead:
        """Raises SlotChanged if nothing is committed."""
        return layout.read_head(self._readonly, self._expect(), self.name)

    @property
    def image(self) -> memoryview:
        """Read-only, the whole committed image. Raises SlotChanged if nothing is committed."""
        return self._readonly[: self._expect().image_bytes]

    @property
    def payload(self) -> memoryview:
        """Read-only, the skeleton and the share. Raises SlotChanged if nothing is committed."""
        preamble = self._expect()
        return self._readonly[preamble.payload_at : preamble.image_bytes]

    def seal(self) -> None:
        """Write the sums of a committed payload, then the seal; nothing if it is sealed.

        Raises SlotChanged, and does not seal, if the slot is not committed or its rank began anew meanwhile.
        """
        preamble = self._expect()
        if preamble.seal:
            return
        head = layout.read_head(self._readonly, preamble, self.name)
        payload = self._readonly[preamble.payload_at : preamble.image_bytes]
        area = layout.pack_sums(layout.chunk_sums(payload, head))
        self._expect(preamble.commit)
        self._buffer[preamble.sums_at : preamble.payload_at] = area
        word = layout.write_sums_sum(self._buffer, area)
        self._expect(preamble.commit)
        layout.write_seal(self._buffer, word)

    def sums(self) -> tuple[int, ...]:
        """The xxh3_64 of each chunk, as sealed. Raises SlotChanged if the slot is not sealed."""
        preamble = self._expect()
        if not preamble.seal:
            raise SlotChanged(f"{self.name} is not sealed, so there are no sums")
        return layout.read_sums(self._readonly, preamble, self.name)

    def verify(self) -> tuple[int, ...]:
        """The numbers of the chunks that are not what was sealed; ascending, empty if all is well.

        Raises SlotChanged if the slot is not sealed, or its rank began anew meanwhile.
        """
        preamble = self._expect()
        if not preamble.seal:
            raise SlotChanged(f"{self.name} is not sealed, so there is nothing to compare with")
        head = layout.read_head(self._readonly, preamble, self.name)
        sealed = layout.read_sums(self._readonly, preamble, self.name)
        found = layout.chunk_sums(self._readonly[preamble.payload_at : preamble.image_bytes], head)
        self._expect(preamble.commit)
        return tuple(number for number, pair in enumerate(zip(sealed, found, strict=True)) if pair[0] != pair[1])

    def close(self) -> None:
        """Unmap it, or leave that to whoever still holds an image or payload."""
        self._readonly.release()
        _close(self._buffer, self._mapped)

    def _preamble(self) -> Preamble | None:
        return layout.read_preamble(self._readonly, self.name)

    def _expect(self, commit: int | None = None) -> Preamble:
        """The preamble, which must be committed, and with this word if one is given."""
        preamble = self._preamble()
        if preamble is None or commit not in (None, preamble.commit):
            raise SlotChanged(f"{self.name} is not committed" + (" any more" if commit else ""))
        return preamble


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSlot:
    """A slot file as `find_slots` saw it. head: None unless committed or sealed; why: what is wrong with it."""

    path: Path
    state: Literal["open", "committed", "sealed", "rotten", "not a slot"]
    head: SlotHead | None = None
    why: str = ""


def find_slots(folder: Path, pattern: str = "*.slot-*") -> list[FoundSlot]:
    """What a former keeper's ranks left here, by name. Chunks are not verified; empty without such a folder."""
    found = []
    for path in sorted(folder.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):  # removed just now
            found.append(_look(path))
    return found


def _look(path: Path) -> FoundSlot:
    try:
        view = SlotView.open(path)
    except NotASlot as error:
        return FoundSlot(path=path, state="not a slot", why=str(error))
    except RottenSlot as error:
        return FoundSlot(path=path, state="rotten", why=str(error))
    with contextlib.closing(view):
        try:
            return FoundSlot(path=path, state=view.state, head=view.head())
        except SlotChanged:
            return FoundSlot(path=path, state="open")
        except SlotError as error:
            return FoundSlot(path=path, state="rotten", why=str(error))


class _Descriptor:
    """An open file, and whether it may be mapped without a risk of SIGBUS."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # Not blocking: it might be a pipe.
            self._number = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise NotASlot(f"{path} can't be opened as a slot: {error.strerror}") from error

    def map(self) -> mmap.mmap:
        found = os.fstat(self._number)
        if not stat.S_ISREG(found.st_mode) or found.st_size < layout.PAGE_BYTES:
            raise NotASlot(f"{self._path} is no file of at least {layout.PAGE_BYTES} bytes")
        if found.st_blocks * 512 < found.st_size:
            raise NotASlot(f"{self._path} has holes: not all of its {found.st_size} bytes are reserved")
        return mmap.mmap(self._number, found.st_size)

    def close(self) -> None:
        os.close(self._number)


def _close(buffer: memoryview, mapped: mmap.mmap | None) -> None:
    buffer.release()
    if mapped is not None:
        with contextlib.suppress(BufferError):  # views are in use; unmapped with the last of them
            mapped.close()
