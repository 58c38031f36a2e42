"""A parity block as a file in shared memory: bytes that say themselves what they are the parity of.

    0        preamble, 4096 bytes: magic, format, lengths and checksums of what follows, and the commit word
    4096     head: JSON, which snapshot, class and row, and the images covered; room for HEAD_BYTES
    ...      payload: the block
    ...      sums: xxh3_64 of each MiB of the payload, padded with zeros to a multiple of 4096

    empty --begin--> open --commit word--> committed
                      ^------------------------+

Rules. The commit word is zero while anything else is written, and is written last. It is a hash of the preamble
before it. Only the keeper whose memory it is writes a block; who adopts its files reads the committed ones.

What is covered is known only when all data has come, so the head is written at the end, into room kept for it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from snapshot.core.inventory import ParityFound
from snapshot.fields import mapping, parity_fields, parity_from, text, whole
from snapshot.mapped import NotMappable, map_file
from snapshot.room import reserve
from snapshot.slot import PAGE_BYTES, fence, pack_sums, padded
from snapshot.tree import to_bytes

FORMAT = 2
HEAD_BYTES = 128 << 10
"""Enough for some thousand shards."""
SUMMED_BYTES = 1 << 20
PAYLOAD_AT = PAGE_BYTES + HEAD_BYTES

_MAGIC = b"RSLPRTY1"
_ZEROS = memoryview(bytes(SUMMED_BYTES))
_FIELDS = struct.Struct("<8sI4xQQ")
_SUMS = struct.Struct("<QQQ")
_WORD = struct.Struct("<Q")
_SUMS_AT, _COMMIT_AT, _COMMIT_STOP = _FIELDS.size, _FIELDS.size + _SUMS.size, _FIELDS.size + _SUMS.size + _WORD.size


class RottenParity(Exception):
    """It was committed once, but preamble, head or sums no longer agree with their checksums. Its bytes are lost."""


class NotParity(Exception):
    """There is no parity block here: a file that is still being created, is too short, or is something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityHead:
    """run: whose. found: what it is the parity of. block_bytes: its length."""

    run: str
    found: ParityFound
    block_bytes: int

    def to_bytes(self) -> bytes:
        """Raises ValueError if there are so many shards that there is no room for the head."""
        data = to_bytes({"run": self.run, "parity": parity_fields(self.found), "block_bytes": self.block_bytes})
        if len(data) > HEAD_BYTES:
            raise ValueError(f"parity: its head needs {len(data)} bytes, more than {HEAD_BYTES}; too many shards")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> ParityHead:
        """Raises ValueError for anything that `to_bytes` can't have written."""
        try:
            fields: Any = mapping(json.loads(data), "parity head")
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not the head of a parity block: {error!r:.200}") from error
        return cls(
            run=text(fields.get("run"), "parity head: run"),
            found=parity_from(fields.get("parity")),
            block_bytes=whole(fields.get("block_bytes"), "parity head: block_bytes"),
        )


def file_bytes(block_bytes: int) -> int:
    """The length of a file that has room for a block."""
    return PAYLOAD_AT + padded(block_bytes) + padded(_WORD.size * -(-block_bytes // SUMMED_BYTES))


class ParityFile:
    """One block's file, mapped. Who writes it sees to it that nobody else does meanwhile."""

    def __init__(self, path: Path, mapped: mmap.mmap, *, zero: bool) -> None:
        self.path = path
        self.block_bytes = 0
        self._buffer = memoryview(mapped)
        self._zero = zero
        self._noted: dict[int, int] = {}
        """Sums that are known already, by number of the MiB."""

    @classmethod
    def create(cls, path: Path, block_bytes: int) -> ParityFile:
        """A new file of mode 0600, all of its pages reserved and present; other threads run meanwhile.

        Raises NoRoom, saying what to change, and FileExistsError.
        """
        return cls(path, reserve(path, file_bytes(block_bytes)), zero=True)

    @classmethod
    def open(cls, path: Path) -> ParityFile:
        """A file that is there, to read what is committed or to write it anew. Raises NotParity, FileNotFoundError."""
        try:
            return cls(path, map_file(path, file_bytes(0)), zero=False)
        except NotMappable as error:
            raise NotParity(str(error)) from error

    @property
    def held_bytes(self) -> int:
        return len(self._buffer)

    @property
    def payload(self) -> memoryview:
        """The block, of `block_bytes`, writable. Whoever reads it may hold on to it as long as he wants to."""
        return self._buffer[PAYLOAD_AT : PAYLOAD_AT + self.block_bytes]

    def fits(self, block_bytes: int) -> bool:
        return file_bytes(block_bytes) <= len(self._buffer)

    def begin(self, block_bytes: int, *, zeros: bool) -> None:
        """Invalidate it. From now on `payload` has this length; only if `zeros`, it is zeros, also where it grows.

        Raises ValueError if it does not fit.
        """
        if not self.fits(block_bytes):
            raise ValueError(f"{self.path}: a block of {block_bytes} bytes does not fit into {len(self._buffer)}")
        self.invalidate()
        if zeros and not self._zero:
            for start in range(PAYLOAD_AT, len(self._buffer), SUMMED_BYTES):
                part = self._buffer[start : start + SUMMED_BYTES]
                part[:] = _ZEROS[: len(part)]
        self._zero = False
        self._noted.clear()
        self.block_bytes = block_bytes

    def note_sum(self, start: int, length: int, xxh3_64: int) -> None:
        """The sum of these bytes of the payload, which do not change any more, so that `commit` need not read them."""
        number, rest = divmod(start, SUMMED_BYTES)
        if rest == 0 and length == SUMMED_BYTES:
            self._noted[number] = xxh3_64

    def extend(self, block_bytes: int) -> None:
        """The block is longer than was known when it was begun with zeros. The caller owes that it fits."""
        assert self.fits(block_bytes), (self.path, block_bytes)
        self.block_bytes = max(self.block_bytes, block_bytes)

    def commit(self, run: str, found: ParityFound) -> None:
        """The payload is complete: from this moment on the block counts. Raises ValueError for too long a head."""
        head = ParityHead(run=run, found=found, block_bytes=self.block_bytes).to_bytes()
        sums = pack_sums(self._payload_sums(self._noted))
        fields = _FIELDS.pack(_MAGIC, FORMAT, len(head), self.block_bytes)
        preamble = fields + _SUMS.pack(_sum(fields), _sum(head), _sum(sums))
        self._buffer[:PAGE_BYTES] = preamble.ljust(PAGE_BYTES, b"\0")
        self._buffer[PAGE_BYTES : PAGE_BYTES + len(head)] = head
        sums_at = PAYLOAD_AT + padded(self.block_bytes)
        self._buffer[sums_at : sums_at + len(sums)] = sums
        fence()
        self._buffer[_COMMIT_AT:_COMMIT_STOP] = _WORD.pack(_word(preamble))

    def invalidate(self) -> None:
        """From this moment on it is no parity block."""
        self._buffer[_COMMIT_AT:_COMMIT_STOP] = bytes(_WORD.size)
        fence()

    def read(self) -> ParityHead | None:
        """The head of a committed block, whose payload is then to be had; None if it is empty or open.

        Raises RottenParity. Does not look at the payload.
        """
        raw = bytes(self._buffer[:PAGE_BYTES])
        (commit,) = _WORD.unpack_from(raw, _COMMIT_AT)
        if commit == 0:
            return None
        magic, form, head_bytes, block_bytes = _FIELDS.unpack_from(raw)
        fields_sum, head_sum, _ = _SUMS.unpack_from(raw, _SUMS_AT)
        known = (magic, form) == (_MAGIC, FORMAT) and fields_sum == _sum(raw[: _FIELDS.size])
        if not known or commit != _word(raw) or head_bytes > HEAD_BYTES or not self.fits(block_bytes):
            raise RottenParity(f"{self.path}: the preamble is damaged, or of another version than {FORMAT}")
        data = bytes(self._buffer[PAGE_BYTES : PAGE_BYTES + head_bytes])
        if _sum(data) != head_sum:
            raise RottenParity(f"{self.path}: the head is damaged")
        try:
            head = ParityHead.from_bytes(data)
        except ValueError as error:
            raise RottenParity(f"{self.path}: {error}") from error
        if head.block_bytes != block_bytes:
            raise RottenParity(f"{self.path}: head and preamble do not agree on the length")
        self.block_bytes = block_bytes
        return head

    def verify(self) -> tuple[int, ...]:
        """Which MiB of a committed payload are not what was committed; ascending. Raises RottenParity."""
        _, _, sums_sum = _SUMS.unpack_from(self._buffer, _SUMS_AT)
        expected = pack_sums([0] * -(-self.block_bytes // SUMMED_BYTES))
        sums_at = PAYLOAD_AT + padded(self.block_bytes)
        area = bytes(self._buffer[sums_at : sums_at + len(expected)])
        if _sum(area) != sums_sum:
            raise RottenParity(f"{self.path}: the sums are damaged")
        sums = [value for (value,) in _WORD.iter_unpack(area)]
        return tuple(number for number, found in enumerate(self._payload_sums({})) if found != sums[number])

    def unlink(self) -> None:
        """Remove the file; who has mapped it keeps it."""
        with contextlib.suppress(FileNotFoundError):  # somebody has removed the whole folder
            self.path.unlink()

    def _payload_sums(self, noted: Mapping[int, int]) -> list[int]:
        payload = self.payload
        count = -(-len(payload) // SUMMED_BYTES)
        return [
            noted[number]
            if number in noted
            else _sum(payload[number * SUMMED_BYTES : number * SUMMED_BYTES + SUMMED_BYTES])
            for number in range(count)
        ]


def _sum(data: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _word(preamble: bytes) -> int:
    return xxhash.xxh3_64_intdigest(preamble[:_COMMIT_AT], seed=1) or 1
