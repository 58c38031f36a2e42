"""Chunks of a stored share on their way into memory: which pieces to read, and what to do with each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock, local
from typing import TypeVar

import xxhash

from snapshot.coding import CodingError, Decoder
from snapshot.core.manifest import ShardManifest
from snapshot.core.ranges import cuts_of
from snapshot.files import Files

PIECE_BYTES = 4 << 20
"""About what is read at once by each thread, and then hashed while it is in the processor's cache."""

Item = TypeVar("Item")
_THREAD = local()


class RottenChunk(Exception):
    """A chunk is not what was written. number: which one of its shard."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.number = number
        self.why = why


class StoredShard:
    """A shard of an opened checkpoint: where its chunks lie in its file and in the state."""

    def __init__(self, files: Files, name: str, shard: ShardManifest) -> None:
        """name: of its file, with the folder."""
        self.name = name
        self.shard = shard
        self._files = files
        self.ranges = shard.ranges
        self.ends = tuple(chunk.end for chunk in shard.chunks)
        self.stored_ends = shard.stored_ends

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """Bytes (start, stop) of the state that it has, and the first one's offset in the share."""
        for (start, stop), end in zip(self.ranges, cuts_of(self.ranges), strict=True):
            yield start, stop, end - (stop - start)

    def span(self, number: int) -> tuple[int, int]:
        """A chunk's bytes in the share."""
        return (self.ends[number - 1] if number else 0), self.ends[number]

    def stored_span(self, number: int) -> tuple[int, int]:
        """A chunk's bytes in the file."""
        return (self.stored_ends[number - 1] if number else 0), self.stored_ends[number]

    def within(self, start: int, stop: int) -> range:
        """The chunks that have some of these bytes of the share."""
        if start >= stop:
            return range(0)
        return range(bisect_right(self.ends, start), bisect_right(self.ends, stop - 1) + 1)

    def runs(self, numbers: Iterable[int], start: int, stop: int) -> Iterator[tuple[range, bool]]:
        """Chunks to be read at once, and whether they may go straight to where bytes start..stop are wanted."""
        first, length, former = 0, 0, False
        last = first - 1
        for number in numbers:
            begin, end = self.span(number)
            direct = self.shard.chunks[number].coding == "raw" and start <= begin and end <= stop
            stored_begin, stored_end = self.stored_span(number)
            if last >= first and (direct != former or length + stored_end - stored_begin > PIECE_BYTES):
                yield range(first, last + 1), former
                length = 0
            if length == 0:
                first = number
            former, last, length = direct, number, length + stored_end - stored_begin
        if length:
            yield range(first, last + 1), former

    def read_straight(self, run: range, into: memoryview) -> None:
        """Raw chunks one after the other. Raises RottenChunk."""
        begin = self.span(run[0])[0]
        try:
            self._files.read_into(self.name, self.stored_span(run[0])[0], into)
        except FileNotFoundError as error:
            raise RottenChunk(run[0], "the file is missing") from error
        for number in run:
            start, stop = self.span(number)
            if xxhash.xxh3_64_intdigest(into[start - begin : stop - begin]) != self.shard.chunks[number].xxh3_64:
                raise RottenChunk(number, "its checksum differs")

    def read_coded(self, run: range) -> Iterator[tuple[int, memoryview | RottenChunk]]:
        """Each chunk as it was captured, valid until the next one, or what is wrong with it."""
        room = memoryview(bytearray(max(end - begin for begin, end in map(self.span, run))))
        try:
            found = self._stored(run)
        except RottenChunk as error:
            yield from ((number, RottenChunk(number, error.why)) for number in run)
            return
        for number, stored in found:
            begin, end = self.span(number)
            try:
                self._decode(number, stored, room[: end - begin])
                yield number, room[: end - begin]
            except RottenChunk as error:
                yield number, error

    def read_coded_into(self, run: range, start: int, into: memoryview) -> None:
        """Fill `into`, from byte `start` of the share on, with what it has of these chunks. Raises RottenChunk."""
        stop = start + len(into)
        for number, stored in self._stored(run):
            begin, end = self.span(number)
            if start <= begin and end <= stop:
                self._decode(number, stored, into[begin - start : end - start])
                continue
            raw = memoryview(bytearray(end - begin))
            self._decode(number, stored, raw)
            first, last = max(begin, start), min(end, stop)
            into[first - start : last - start] = raw[first - begin : last - begin]

    def _stored(self, run: range) -> list[tuple[int, memoryview]]:
        """Each chunk as it is stored. Raises RottenChunk if the file is missing."""
        begin = self.stored_span(run[0])[0]
        stored = memoryview(bytearray(self.stored_span(run[-1])[1] - begin))
        try:
            self._files.read_into(self.name, begin, stored)
        except FileNotFoundError as error:
            raise RottenChunk(run[0], "the file is missing") from error
        spans = ((number, *self.stored_span(number)) for number in run)
        return [(number, stored[start - begin : stop - begin]) for number, start, stop in spans]

    def _decode(self, number: int, stored: memoryview, into: memoryview) -> None:
        chunk = self.shard.chunks[number]
        if xxhash.xxh3_64_intdigest(stored) != chunk.stored_xxh3_64:
            raise RottenChunk(number, "its checksum differs")
        if chunk.coding == "raw":
            into[:] = stored
            return
        try:
            _decoder().decode(stored, chunk.shuffle, into)
        except CodingError as error:
            raise RottenChunk(number, str(error)) from error
        if xxhash.xxh3_64_intdigest(into) != chunk.xxh3_64:
            raise RottenChunk(number, "it was decoded into other bytes than were captured")


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of chunks of which bytes start..stop of the share are wanted in `into`."""

    shard: StoredShard
    run: range
    straight: bool
    start: int
    stop: int
    into: memoryview

    def read(self) -> None:
        """Raises RottenChunk and StorageError."""
        shard = self.shard
        if self.straight:
            begin, end = shard.span(self.run[0])[0], shard.span(self.run[-1])[1]
            shard.read_straight(self.run, self.into[begin - self.start : end - self.start])
            return
        shard.read_coded_into(self.run, self.start, self.into)


def pieces(shard: StoredShard, start: int, stop: int, into: memoryview) -> Iterator[Piece]:
    """To fill `into` with bytes start..stop of a share."""
    for run, straight in shard.runs(shard.within(start, stop), start, stop):
        yield Piece(shard, run, straight, start, stop, into)


def in_threads(work: Callable[[Item], None], items: Iterator[Item], threads: int) -> None:
    """work of each, in so many threads; items are drawn as they are needed. The first error ends it."""
    lock, over = Lock(), False

    def go_on() -> None:
        nonlocal over
        while True:
            with lock:
                item = None if over else next(items, None)
            if item is None:
                return
            try:
                work(item)
            except BaseException:  # the others need not finish what nobody will use
                over = True
                raise

    if threads == 1:
        go_on()
        return
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(go_on) for _ in range(threads)]:
            future.result()


def _decoder() -> Decoder:
    if not hasattr(_THREAD, "decoder"):
        _THREAD.decoder = Decoder()
    decoder: Decoder = _THREAD.decoder
    return decoder
