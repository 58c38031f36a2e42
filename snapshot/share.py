"""One rank's share as the parts of its file: whole chunks, each compared with its sum before it is handed on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import xxhash

from snapshot.coding import Encoded, Encoder
from snapshot.core.manifest import StoredChunk
from snapshot.core.ranges import byte_at
from snapshot.skeleton import Skeleton
from snapshot.slot import RottenSlot, SlotHead

Part = TypeVar("Part")

PIECE_BYTES = 8 << 20
"""Long enough for the disk, short enough to give way to training in between."""


class ShareParts:
    """To be gone through once, by `plain` or by `packed`. chunks: those handed on so far, as they are stored."""

    def __init__(self, head: SlotHead, payload: memoryview, sums: Sequence[int], pause: Callable[[], None]) -> None:
        """As `snapshot.store.write_shard`."""
        self.chunks: list[StoredChunk] = []
        self._head = head
        self._skeleton = payload[: head.skeleton_bytes]
        self._share = payload[head.skeleton_bytes :]
        self._sums = sums
        self._pause = pause

    def plain(self) -> Iterator[memoryview]:
        """The share itself, without a copy."""
        written = 0
        for begin, end, total in self._checked():
            self._note(end, total, Encoded(coding="raw", shuffle=1, data=self._share[begin:end]))
            if end - written >= PIECE_BYTES or end == len(self._share):
                self._pause()
                yield self._share[written:end]
                written = end

    def packed(self, encoder: Encoder) -> Iterator[bytes]:
        """Each chunk encoded."""
        layout = Skeleton.from_bytes(bytes(self._skeleton))
        offsets, ready = layout.offsets, bytearray()
        for begin, end, total in self._checked():
            tensor = layout.tensors[bisect_right(offsets, byte_at(self._head.ranges, begin)) - 1]
            encoded = encoder.encode(self._share[begin:end], tensor.itemsize)
            self._note(end, total, encoded)
            ready += encoded.data
            if len(ready) >= PIECE_BYTES or end == len(self._share):
                self._pause()
                yield bytes(ready)
                ready.clear()

    def _checked(self) -> Iterator[tuple[int, int, int]]:
        """(begin, end, sum) of each chunk of the share."""
        begin = 0
        for number, payload_end in enumerate(self._head.chunks[1:], start=1):
            end = payload_end - self._head.skeleton_bytes
            check_chunk(self._head, number, self._share[begin:end], self._sums[number])
            yield begin, end, self._sums[number]
            begin = end

    def _note(self, end: int, total: int, encoded: Encoded) -> None:
        stored = total if encoded.coding == "raw" else xxhash.xxh3_64_intdigest(encoded.data)
        self.chunks.append(
            StoredChunk(
                end=end,
                stored_bytes=len(encoded.data),
                coding=encoded.coding,
                shuffle=encoded.shuffle,
                xxh3_64=total,
                stored_xxh3_64=stored,
            )
        )


def check_chunk(head: SlotHead, number: int, data: memoryview, wanted: int) -> None:
    """Raises RottenSlot."""
    if xxhash.xxh3_64_intdigest(data) != wanted:
        raise RottenSlot(
            f"rank {head.rank}, step {head.step}: chunk {number} is not what was sealed: memory has changed it"
        )


def ahead(parts: Iterable[Part]) -> Iterator[Part]:
    """The same, each made by another thread while the one before is written."""
    waiting = iter(parts)
    with ThreadPoolExecutor(1, "preparing shards") as maker:
        made = maker.submit(next, waiting, None)
        while (part := made.result()) is not None:
            made = maker.submit(next, waiting, None)
            yield part
