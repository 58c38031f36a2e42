"""A slot's image: one rank's share of one snapshot, as bytes that describe themselves.

    0      preamble, 4096 bytes: magic, format, lengths and checksums of what follows, and two words
    4096   head: canonical JSON, padded with zeros to a multiple of 4096
    ...    sums: xxh3_64 of each chunk of the payload, padded alike
    ...    payload: the skeleton (chunk 0), then the share

    empty --begin--> open --commit word--> committed --seal word--> sealed
                      ^------------------------+----------------------+

Rules. Both words are zero before anything else is written. The rank writes the commit word last, the keeper
the seal word last, after the sums. Each word is a hash of the preamble before it, so that neither garbage nor
a late writer makes a slot look like what it is not. A sealed image does not change until both words are zero.
"""

from __future__ import annotations

import json
import re
import struct
import threading
from dataclasses import dataclass
from typing import Any

import xxhash

from snapshot.core.ranges import Ranges, check_ranges, cuts_of
from snapshot.tree import to_bytes

PAGE_BYTES = 4096
FORMAT = 2
HEAD_LIMIT_BYTES = 16 << 20
SUM_BYTES = 8

_MAGIC = b"RSLSLOT1"
_FIELDS = struct.Struct("<8sI4xQQQ")
_CHECKS = struct.Struct("<QQQQQ")
_WORD = struct.Struct("<Q")
# Eight bytes, aligned, in one cache line: no reader sees half a word.
_HEAD_SUM_AT, _SUMS_SUM_AT, _COMMIT_AT, _SEAL_AT, _WORDS_STOP = 48, 56, 64, 72, 80
_COMMIT_SEED, _SEAL_SEED = 1, 2
_BARRIER = threading.Lock()


class SlotError(Exception):
    """A slot can't be used as asked; its bytes count as lost, nothing else is."""


class NotASlot(SlotError):
    """There is no slot here: a file that is still being created, is too short, or is something else."""


class RottenSlot(SlotError):
    """It was committed once, but preamble, head or sums no longer agree with their checksums.

    Memory or a writer is at fault. None of the image can be trusted; decode it from parity.
    """


class SlotChanged(SlotError):
    """It is not, or no longer, in the state that the caller relied on: its rank has begun anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHead:
    """What a slot holds. Raises ValueError, naming field and value, for what no rank can mean.

    run, attempt, branch, generation, step: which snapshot; the state at the start of `step`.
    member: the incarnation that wrote it. rank, world: whose share, of how many.
    ranges: the share: which bytes of the concatenation of all tensors, which has state_bytes; see `core.ranges`.
    chunks: where each chunk of the payload ends, in bytes, ascending; the first is the skeleton, none spans two ranges.
    skeleton: digest of the skeleton, in hexadecimal.
    durable: it is to be made so: the keeper writes it to storage.
    """

    run: str
    attempt: int
    branch: int
    generation: int
    step: int
    member: int
    rank: int
    world: int
    ranges: Ranges
    state_bytes: int
    chunks: tuple[int, ...]
    skeleton: str
    skeleton_bytes: int
    durable: bool = False

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 1 << 63:
                raise ValueError(f"slot head: {name}: {value!r:.80} is not an integer within 0..2**63-1")
        if type(self.run) is not str or not 0 < len(self.run) <= 255:
            raise ValueError(f"slot head: run: {self.run!r:.80} is not a name of 1..255 characters")
        if type(self.skeleton) is not str or not _DIGEST.fullmatch(self.skeleton):
            raise ValueError(f"slot head: skeleton: {self.skeleton!r:.80} is not a digest in hexadecimal")
        if type(self.durable) is not bool:
            raise ValueError(f"slot head: durable: {self.durable!r:.80} is neither true nor false")
        if self.rank >= self.world:
            raise ValueError(f"slot head: rank: {self.rank} is not within 0..{self.world - 1}")
        try:
            check_ranges(self.ranges, self.state_bytes)
        except ValueError as error:
            raise ValueError(f"slot head: {error}") from error
        self._check_chunks()

    def _check_chunks(self) -> None:
        if type(self.chunks) is not tuple or not all(type(end) is int for end in self.chunks):
            raise ValueError("slot head: chunks: not a tuple of integers")
        if self.chunks[:1] != (self.skeleton_bytes,) or self.skeleton_bytes == 0:
            raise ValueError(f"slot head: chunks: the first must be the skeleton, 0..{self.skeleton_bytes}")
        if any(end <= former for former, end in zip(self.chunks, self.chunks[1:], strict=False)):
            raise ValueError("slot head: chunks: the ends do not ascend")
        cuts = [self.skeleton_bytes + end for end in (0, *cuts_of(self.ranges))]
        if self.chunks[-1] != cuts[-1]:
            raise ValueError(f"slot head: chunks: they end at {self.chunks[-1]}, not with the share")
        if len(cuts) > 2 and not set(self.chunks).issuperset(cuts):
            raise ValueError("slot head: chunks: one spans two ranges")

    @property
    def share_bytes(self) -> int:
        return self.payload_bytes - self.skeleton_bytes

    @property
    def payload_bytes(self) -> int:
        return self.chunks[-1]

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Which snapshot: (attempt, branch, step, generation)."""
        return self.attempt, self.branch, self.step, self.generation

    def to_bytes(self) -> bytes:
        """Raises ValueError if there are so many chunks that no reader would accept them."""
        lists = {"chunks": list(self.chunks), "ranges": [list(each) for each in self.ranges]}
        data = to_bytes({name: getattr(self, name) for name in self.__slots__} | lists)
        if len(data) > HEAD_LIMIT_BYTES:
            raise ValueError(f"slot head: chunks: {len(self.chunks)} need more than {HEAD_LIMIT_BYTES} bytes")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> SlotHead:
        """Raises ValueError for anything that `to_bytes` can't have written."""
        if len(data) > HEAD_LIMIT_BYTES:
            raise ValueError(f"slot head: {len(data)} bytes, more than {HEAD_LIMIT_BYTES}")
        try:
            node: Any = json.loads(data)
            head = cls(**{**node, "chunks": tuple(node["chunks"]), "ranges": tuple(map(tuple, node["ranges"]))})
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not the head of a slot: {error!r:.200}") from error
        if head.to_bytes() != data:
            raise ValueError("not the head of a slot: it is not spelled canonically")
        return head


_OTHERS = ("run", "ranges", "chunks", "skeleton", "durable")
_COUNTS = tuple(name for name in SlotHead.__slots__ if name not in _OTHERS)
_DIGEST = re.compile("[0-9a-f]{8,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preamble:
    """The first page of an image, as it was read at one moment, and found right.

    seal: 0 as long as no keeper has sealed the image; then also `sums_sum` says nothing.
    """

    head_bytes: int
    sums_bytes: int
    payload_bytes: int
    head_sum: int
    sums_sum: int
    commit: int
    seal: int

    @property
    def sums_at(self) -> int:
        return PAGE_BYTES + padded(self.head_bytes)

    @property
    def payload_at(self) -> int:
        return self.sums_at + padded(self.sums_bytes)

    @property
    def image_bytes(self) -> int:
        return self.payload_at + self.payload_bytes


def padded(size: int) -> int:
    """Up to the next multiple of a page."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def image_bytes(head: SlotHead) -> int:
    """How long the image of a slot with this head is."""
    sums_bytes = SUM_BYTES * len(head.chunks)
    return PAGE_BYTES + padded(len(head.to_bytes())) + padded(sums_bytes) + head.payload_bytes


def write_front(buffer: memoryview, head: SlotHead) -> tuple[int, int]:
    """Invalidate, then write all that stands before the payload. (Where the payload begins, commit word.)

    The caller owes that the buffer has room for `image_bytes(head)`, and that nobody seals it meanwhile.
    """
    clear_words(buffer)
    raw_head, sums_bytes = head.to_bytes(), SUM_BYTES * len(head.chunks)
    area = raw_head.ljust(padded(len(raw_head)), b"\0")
    fields = _FIELDS.pack(_MAGIC, FORMAT, len(raw_head), sums_bytes, head.payload_bytes)
    checks = _CHECKS.pack(_sum(fields), _sum(area), 0, 0, 0)
    sums_at = PAGE_BYTES + len(area)
    payload_at = sums_at + padded(sums_bytes)
    buffer[:PAGE_BYTES] = (fields + checks).ljust(PAGE_BYTES, b"\0")
    buffer[PAGE_BYTES:sums_at] = area
    buffer[sums_at:payload_at] = bytes(payload_at - sums_at)
    return payload_at, _word(buffer, _COMMIT_SEED)


def clear_words(buffer: memoryview) -> None:
    """From here on the slot is not committed, whatever else happens to it."""
    buffer[_COMMIT_AT:_WORDS_STOP] = bytes(2 * _WORD.size)
    fence()


def write_commit(buffer: memoryview, word: int) -> None:
    fence()
    # Together with the seal word: a keeper that sealed too late must not have the last say.
    buffer[_COMMIT_AT:_WORDS_STOP] = _WORD.pack(word) + _WORD.pack(0)


def write_sums_sum(buffer: memoryview, area: bytes) -> int:
    """Write the hash of the sums; the word that will seal the image."""
    _WORD.pack_into(buffer, _SUMS_SUM_AT, _sum(area))
    return _word(buffer, _SEAL_SEED)


def write_seal(buffer: memoryview, word: int) -> None:
    fence()
    _WORD.pack_into(buffer, _SEAL_AT, word)


def read_preamble(buffer: memoryview, where: str) -> Preamble | None:
    """The preamble of a committed slot; None if it is empty or open.

    where: what to call the slot in messages.
    Raises NotASlot, or RottenSlot if it was committed but is damaged. Does not look past the first page.
    """
    raw = bytes(buffer[:PAGE_BYTES])
    if len(raw) < PAGE_BYTES:
        raise NotASlot(f"{where} has {len(raw)} bytes, not even a preamble of {PAGE_BYTES}")
    if raw.count(0) == PAGE_BYTES:
        return None
    magic, form, head_bytes, sums_bytes, payload_bytes = _FIELDS.unpack_from(raw)
    fields_sum, head_sum, sums_sum, commit, seal = _CHECKS.unpack_from(raw, _FIELDS.size)
    if magic not in (_MAGIC, bytes(len(_MAGIC))):
        raise NotASlot(f"{where} begins with {magic!r}, not with {_MAGIC!r}")
    if commit == 0:  # perhaps half written: nothing else of it has a meaning yet
        return None
    if fields_sum != _sum(raw[: _FIELDS.size]) or commit != _word(raw, _COMMIT_SEED) or raw[_WORDS_STOP:].strip(b"\0"):
        raise RottenSlot(f"{where}: the preamble is damaged")
    if seal not in (0, _word(raw, _SEAL_SEED)):
        raise RottenSlot(f"{where}: the seal is damaged, or sums were written after it")
    if form != FORMAT:
        raise NotASlot(f"{where} has format {form}, this version reads {FORMAT}")
    preamble = Preamble(
        head_bytes=head_bytes,
        sums_bytes=sums_bytes,
        payload_bytes=payload_bytes,
        head_sum=head_sum,
        sums_sum=sums_sum,
        commit=commit,
        seal=seal,
    )
    if preamble.image_bytes > len(buffer) or head_bytes > HEAD_LIMIT_BYTES:
        raise RottenSlot(f"{where}: {len(buffer)} bytes, but the preamble says {preamble.image_bytes}")
    return preamble


def read_head(buffer: memoryview, preamble: Preamble, where: str) -> SlotHead:
    """Raises RottenSlot unless the head is the one that was committed."""
    area = bytes(buffer[PAGE_BYTES : preamble.sums_at])
    if _sum(area) != preamble.head_sum:
        raise RottenSlot(f"{where}: the head is damaged")
    try:
        head = SlotHead.from_bytes(area[: preamble.head_bytes])
    except ValueError as error:
        raise RottenSlot(f"{where}: {error}") from error
    if (SUM_BYTES * len(head.chunks), head.payload_bytes) != (preamble.sums_bytes, preamble.payload_bytes):
        raise RottenSlot(f"{where}: head and preamble do not agree on the chunks")
    return head


def read_sums(buffer: memoryview, preamble: Preamble, where: str) -> tuple[int, ...]:
    """Raises RottenSlot unless the sums are those that were sealed."""
    area = bytes(buffer[preamble.sums_at : preamble.payload_at])
    if _sum(area) != preamble.sums_sum or area[preamble.sums_bytes :].strip(b"\0"):
        raise RottenSlot(f"{where}: the sums are damaged")
    return tuple(value for (value,) in _WORD.iter_unpack(area[: preamble.sums_bytes]))


def chunk_sums(payload: memoryview, head: SlotHead) -> list[int]:
    """xxh3_64 of each chunk."""
    starts = (0, *head.chunks)
    return [_sum(payload[start:stop]) for start, stop in zip(starts, head.chunks, strict=False)]


def pack_sums(sums: list[int]) -> bytes:
    """As they stand in the image, padded."""
    area = struct.pack(f"<{len(sums)}Q", *sums)
    return area.ljust(padded(len(area)), b"\0")


def fence() -> None:
    """What was written before is seen before what is written after, also by another process's core.

    x86 keeps stores in order by itself. Elsewhere a lock that is given back and taken again does it: a release
    followed by an acquire.
    """
    for _ in range(2):
        with _BARRIER:
            pass


def _sum(data: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _word(preamble: bytes | memoryview, seed: int) -> int:
    """The commit word covers fields and head, the seal word also the sums and the commit word."""
    stop = _SUMS_SUM_AT if seed == _COMMIT_SEED else _SEAL_AT
    return xxhash.xxh3_64_intdigest(bytes(preamble[:stop]), seed=seed) or 1
