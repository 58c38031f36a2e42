"""Parts of a state as byte ranges: pairs (start, stop), ascending, not empty, with bytes left out between them.

So equal sets of bytes are equal ranges. A share is the concatenation of its ranges; an *offset* counts its bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]
Ranges: TypeAlias = tuple[Range, ...]

_START, _STOP = itemgetter(0), itemgetter(1)


def merged(ranges: Iterable[Range]) -> Ranges:
    """All bytes that are in any of these, which may overlap, be empty, and come in any order."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        elif start < stop:
            found.append((start, stop))
    return tuple(found)


def size_of(ranges: Iterable[Range]) -> int:
    """How many bytes they have."""
    return sum(stop - start for start, stop in ranges)


def clipped(ranges: Sequence[Range], start: int, stop: int) -> Ranges:
    """What of them lies within start..stop."""
    found = []
    for position in range(bisect_right(ranges, start, key=_STOP), len(ranges)):
        begin, end = ranges[position]
        if begin >= stop:
            break
        if max(begin, start) < min(end, stop):
            found.append((max(begin, start), min(end, stop)))
    return tuple(found)


def common(one: Sequence[Range], other: Sequence[Range]) -> Ranges:
    """What is in both."""
    return tuple(part for start, stop in one for part in clipped(other, start, stop))


def holds(ranges: Sequence[Range], start: int, stop: int) -> bool:
    """Whether all of start..stop is in them."""
    return start >= stop or clipped(ranges, start, stop) == ((start, stop),)


def offset_of(ranges: Sequence[Range], at: int) -> int:
    """How many of their bytes lie before byte `at`: its offset, if they have it."""
    return size_of(clipped(ranges, 0, at))


def byte_at(ranges: Sequence[Range], offset: int) -> int:
    """The byte with this offset."""
    for start, stop in ranges:
        if offset < stop - start:
            return start + offset
        offset -= stop - start
    raise AssertionError(f"offset {offset} lies behind the end of {ranges}")


def cuts_of(ranges: Iterable[Range]) -> list[int]:
    """The offsets at which they end in their share."""
    return list(accumulate(stop - start for start, stop in ranges))


def check_ranges(ranges: object, stop: int) -> None:
    """Raises ValueError, saying what is wrong, unless they are the ranges of some bytes of 0..stop."""
    if type(ranges) is not tuple or not all(type(each) is tuple and len(each) == 2 for each in ranges):
        raise ValueError(f"ranges: {ranges!r:.80} are no pairs (start, stop)")
    reached = -1
    for begin, end in ranges:
        if type(begin) is not int or type(end) is not int:
            raise ValueError(f"ranges: {begin!r:.40}..{end!r:.40} are no integers")
        if not reached < begin < end <= stop:
            raise ValueError(f"ranges: {begin}..{end} is empty, or not within {reached + 1}..{stop}")
        reached = end


def first_uneven(ranges: Iterable[Range], stop: int) -> Range | None:
    """None if they, in any order, have every byte of 0..stop once, and no other.

    Else (reached, start): all up to the first are there, and the next range begins at the second, which is `stop` if
    there is no other.
    """
    reached = 0
    for begin, end in sorted(ranges):
        if begin != reached or end > stop:
            return reached, begin
        reached = end
    return None if reached == stop else (reached, stop)
