"""Where a state is cut: into chunks by its layout alone, and into shares of whole chunks by rank.

A chunk never spans two tensors, and begins at a multiple of 1024 elements from its tensor's start. So
the same state has the same chunks however many ranks there are, and a chunk can be found, checked and
moved on its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from snapshot.core.ranges import Range

CHUNK_ELEMENTS = 256 * 1024
"""At most so many elements per chunk: 1 MiB of fp32."""


def chunk_ends(tensors: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Where each chunk ends in the concatenation of all tensors' bytes, ascending; empty ones have none.

    tensors: (elements, bytes per element) of each, in order.
    """
    ends: list[int] = []
    at = 0
    for elements, itemsize in tensors:
        for done in range(0, elements, CHUNK_ELEMENTS):
            ends.append(at + min(done + CHUNK_ELEMENTS, elements) * itemsize)
        at += elements * itemsize
    return tuple(ends)


def share_of(ends: Sequence[int], rank: int, world: int) -> tuple[int, int]:
    """The bytes (start, stop) that rank captures of `world` ranks: whole chunks, as even as they allow.

    The shares of all ranks are disjoint and together everything. One may be empty.
    """
    assert 0 <= rank < world, (rank, world)
    return _cut(ends, rank, world), _cut(ends, rank + 1, world)


def _cut(ends: Sequence[int], part: int, parts: int) -> int:
    if part == 0 or not ends:
        return 0
    wanted = ends[-1] * part // parts
    return ends[bisect_left(ends, wanted)]


def ends_within(ends: Sequence[int], ranges: Iterable[Range]) -> list[int]:
    """The chunk ends of a share of these ranges, counted from its start."""
    found: list[int] = []
    before = 0
    for start, stop in ranges:
        first, last = bisect_left(ends, start + 1), bisect_left(ends, stop + 1)
        found.extend(before + end - start for end in ends[first:last])
        before += stop - start
    return found


def are_chunks(ends: Sequence[int], ranges: Iterable[Range]) -> bool:
    """Whether each of the ranges begins and ends where chunks do."""
    return all(_is_cut(ends, at) for each in ranges for at in each)


def _is_cut(ends: Sequence[int], at: int) -> bool:
    position = bisect_left(ends, at)
    return at == 0 or (position < len(ends) and ends[position] == at)
