"""A durable checkpoint, opened to be read: every byte compared with its checksum on the way."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from snapshot.core.manifest import Manifest
from snapshot.core.names import MANIFEST, SKELETON, is_temporary, shard_file, shard_manifest
from snapshot.core.ranges import byte_at
from snapshot.core.spelling import ManifestError
from snapshot.files import Files, StorageError
from snapshot.manifests import read_manifest, read_shards, read_skeleton
from snapshot.reading import PIECE_BYTES, Piece, RottenChunk, StoredShard, in_threads, pieces
from snapshot.skeleton import Skeleton
from snapshot.store import Found

Range = tuple[int, memoryview]
"""Where it begins in the state, and what is to be filled from there."""


class RottenCheckpoint(Exception):
    """A file of a complete checkpoint is missing, or bytes in it are not those that were written.

    Storage is at fault, or somebody has changed the file; another checkpoint may be whole. The message names the
    file, and the chunk and its tensors.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class BadChunk:
    """What `verify` has found. chunk: its number in its shard; None: it is about all of the file."""

    file: str
    chunk: int | None
    tensors: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        chunk = "" if self.chunk is None else f": chunk {self.chunk} (of {', '.join(self.tensors)})"
        return f"{self.file}{chunk}: {self.why}"


class Stored:
    """Its manifests agree with each other, and with the lengths of its files; see `open`."""

    def __init__(
        self, files: Files, folder: str, manifest: Manifest, skeleton: Skeleton, shards: Sequence[StoredShard]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.skeleton = skeleton
        self._files = files
        self._offsets = skeleton.offsets
        self._shards = shards
        self._segments = sorted((*each, number) for number, shard in enumerate(shards) for each in shard.segments())
        """Bytes (start, stop) of the state, the first one's offset in a share, and which shard's this is."""
        self._stops = [stop for _, stop, *_ in self._segments]

    @classmethod
    def open(cls, files: Files, found: Found | str) -> Stored:
        """Reads all manifests and the skeleton, none of the tensors.

        Raises ManifestError for what is damaged, or written by a newer version, and RottenCheckpoint for what is
        missing.
        """
        folder = found if isinstance(found, str) else found.folder
        try:
            manifest = read_manifest(files, folder)
            shards, entries = read_shards(files, folder, manifest.world)
            skeleton = read_skeleton(files, folder, shards)
        except FileNotFoundError as error:
            raise RottenCheckpoint(f"{folder}: a file is missing: {error}") from error
        for wanted, entry in zip(manifest.shards, entries, strict=True):
            if wanted != entry:
                raise ManifestError(f"{folder}/{entry.manifest}: it is not the one that {MANIFEST} names")
        for name in ("run", "state_bytes", "skeleton", "skeleton_bytes"):
            if getattr(manifest, name) != getattr(shards[0], name):
                raise ManifestError(f"{folder}/{MANIFEST}: {name}: it is another one in {entries[0].manifest}")
        stored = [StoredShard(files, f"{folder}/{shard.file}", shard) for shard in shards]
        return cls(files, folder, manifest, skeleton, stored)

    @property
    def state_bytes(self) -> int:
        return self.manifest.state_bytes

    def read(self, start: int, stop: int, into: memoryview, *, threads: int | None = None) -> None:
        """Fill `into` with bytes start..stop of the concatenation of all tensors, decoded and verified.

        Raises RottenCheckpoint, then `into` holds anything; and StorageError.
        """
        if len(into) != stop - start:
            raise ValueError(f"into: {len(into)} bytes, but {start}..{stop} are wanted")
        self.fill([(start, into)], threads=threads)

    def fill(self, ranges: Sequence[Range], *, threads: int | None = None) -> None:
        """As `read`, for many buffers at once, of bytes and writable. Fastest for whole tensors, in order."""
        for start, into in ranges:
            if not 0 <= start <= start + len(into) <= self.state_bytes:
                raise ValueError(f"bytes {start}..{start + len(into)} are not within 0..{self.state_bytes}")
        wanted = (piece for start, into in ranges for piece in self._pieces(start, into))
        in_threads(self._read, wanted, threads or self._threads(sum(len(into) for _, into in ranges)))

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[BadChunk]:
        """Read everything again, manifests too. What is bad, and what is missing or has no business here.

        progress: called with bytes read and bytes in all, from any thread, one at a time.
        Raises StorageError if storage can't be read.
        """
        try:
            again = Stored.open(self._files, self.folder)
        except (ManifestError, RottenCheckpoint) as error:
            return [BadChunk(file=self.folder, chunk=None, tensors=(), why=str(error))]
        if again.manifest != self.manifest:
            return [BadChunk(file=f"{self.folder}/{MANIFEST}", chunk=None, tensors=(), why="it has changed")]
        bad, lock, done, total = self._strangers(), Lock(), 0, self.manifest.stored_bytes

        def check(job: tuple[StoredShard, range]) -> None:
            nonlocal done
            shard, run = job
            found = [each for _, each in shard.read_coded(run) if isinstance(each, RottenChunk)]
            with lock:
                bad.extend(self._bad(shard, each) for each in found)
                done += shard.stored_span(run[-1])[1] - shard.stored_span(run[0])[0]
                if progress is not None:
                    progress(done, total)

        jobs = (
            (shard, run)
            for shard in self._shards
            for run, _ in shard.runs(range(len(shard.ends)), 0, shard.shard.share_bytes)
        )
        in_threads(check, jobs, self._threads(total))
        return sorted(bad, key=lambda each: (each.file, each.chunk or 0))

    def check(self, start: int, stop: int) -> None:
        """Raises RottenCheckpoint if a chunk that has some of these bytes is not as it was written."""
        for shard, first, last in self._overlaps(start, stop):
            for run, _ in shard.runs(shard.within(first, last), 0, shard.shard.share_bytes):
                for _, found in shard.read_coded(run):
                    if isinstance(found, RottenChunk):
                        raise RottenCheckpoint(str(self._bad(shard, found))) from found

    def mapped(self, start: int, stop: int) -> memoryview | None:
        """Bytes start..stop as a private, writable map of the file, or None if they don't lie there as they are.

        They do if they are local, not compressed, and of one shard. Nothing is verified: see `check`. Whoever
        truncates the file kills this process (SIGBUS) when it touches the map.
        """
        overlaps = list(self._overlaps(start, stop))
        if len(overlaps) != 1:
            return None
        ((shard, first, last),) = overlaps
        path, run = self._files.path(shard.name), shard.within(first, last)
        if path is None or any(shard.shard.chunks[number].coding != "raw" for number in run):
            return None
        at = shard.stored_span(run[0])[0] + first - shard.span(run[0])[0]
        return _private_map(path, at, last - first)

    def tensors(self, start: int, stop: int) -> tuple[str, ...]:
        """The names of those that have some of these bytes."""
        first, last = bisect_right(self._offsets, start) - 1, bisect_left(self._offsets, stop)
        specs = self.skeleton.tensors[first:last]
        return tuple(spec.name for spec in specs if spec.nbytes)

    def _threads(self, size: int) -> int:
        """For reading so many bytes."""
        most = self._files.lanes if self._files.lanes > 1 else min(4, os.cpu_count() or 1)
        return min(most, 1 + size // PIECE_BYTES)

    def _pieces(self, start: int, into: memoryview) -> Iterator[Piece]:
        filled = 0
        for shard, first, last in self._overlaps(start, start + len(into)):
            yield from pieces(shard, first, last, into[filled : filled + last - first])
            filled += last - first

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[StoredShard, int, int]]:
        """The shards that have some of these bytes, and which of their share they are."""
        position = bisect_right(self._stops, start)
        while start < stop:
            begin, end, offset, number = self._segments[position]
            end = min(stop, end)
            if start < end:
                yield self._shards[number], offset + start - begin, offset + end - begin
            start, position = end, position + 1

    def _read(self, piece: Piece) -> None:
        try:
            piece.read()
        except RottenChunk as error:
            raise RottenCheckpoint(str(self._bad(piece.shard, error))) from error

    def _bad(self, shard: StoredShard, rotten: RottenChunk) -> BadChunk:
        begin, end = shard.span(rotten.number)
        at = byte_at(shard.ranges, begin)
        tensors = self.tensors(at, at + end - begin)
        return BadChunk(file=shard.name, chunk=rotten.number, tensors=tensors, why=rotten.why)

    def _strangers(self) -> list[BadChunk]:
        world = self.manifest.world
        ours = {MANIFEST, SKELETON}
        ours.update(name for rank in range(world) for name in (shard_file(rank, world), shard_manifest(rank, world)))
        return [
            BadChunk(file=f"{self.folder}/{name}", chunk=None, tensors=(), why="it is no part of this checkpoint")
            for name in self._files.names(self.folder)
            if name not in ours and not is_temporary(name)
        ]


def _private_map(path: Path, at: int, length: int) -> memoryview:
    begin = at - at % mmap.ALLOCATIONGRANULARITY
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapped = mmap.mmap(file, at - begin + length, access=mmap.ACCESS_COPY, offset=begin)
        finally:
            os.close(file)
    except FileNotFoundError as error:
        raise RottenCheckpoint(f"{path}: the file is missing") from error
    except (OSError, ValueError) as error:  # ValueError: it is shorter than that
        raise StorageError(f"{path} can't be mapped: {error}") from error
    return memoryview(mapped)[at - begin : at - begin + length]
