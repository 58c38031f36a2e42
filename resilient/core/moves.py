"""Which bytes of the state go from whom to whom when ranks take over layers. Pure.

Every byte that a rank lacks comes from those who have it, each of them sending another part: so whatever moves, it is
sent once to each receiver, and all who have it share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from snapshot.core.ranges import Ranges, clipped, common, size_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Bytes start..stop of the state."""

    sender: int
    receiver: int
    start: int
    stop: int


def transfers(has: Sequence[Ranges], wants: Sequence[Ranges]) -> tuple[Transfer, ...]:
    """By rank, what it has and what it needs; in the same order on all ranks that compute them.

    Raises ValueError if somebody needs what nobody has.
    """
    sources: dict[Ranges, list[int]] = {}
    for rank, ranges in enumerate(has):
        if ranges:
            sources.setdefault(ranges, []).append(rank)
    found: list[Transfer] = []
    for receiver, wanted in enumerate(wants):
        missing = without(wanted, has[receiver])
        for held, senders in sources.items():
            part = common(missing, held)
            found += _shared_out(part, senders, receiver)
            missing = without(missing, part)
        if missing:
            raise ValueError(f"nobody has bytes {missing} of the state, which rank {receiver} needs")
    return tuple(found)


def divided(moves: Sequence[Transfer], later: Ranges) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
    """The same bytes, those outside of `later` first."""
    first = (
        replace(each, start=start, stop=stop)
        for each in moves
        for start, stop in without(((each.start, each.stop),), later)
    )
    then = (
        replace(each, start=start, stop=stop) for each in moves for start, stop in clipped(later, each.start, each.stop)
    )
    return tuple(first), tuple(then)


def _shared_out(part: Ranges, senders: Sequence[int], receiver: int) -> list[Transfer]:
    total, found = size_of(part), []
    for place, sender in enumerate(senders):
        first, last = total * place // len(senders), total * (place + 1) // len(senders)
        found += [
            Transfer(sender=sender, receiver=receiver, start=start, stop=stop)
            for start, stop in _cut(part, first, last)
        ]
    return found


def _cut(ranges: Ranges, first: int, last: int) -> list[tuple[int, int]]:
    """The bytes first..last of their concatenation."""
    found, at = [], 0
    for start, stop in ranges:
        low, high = max(first, at), min(last, at + stop - start)
        if low < high:
            found.append((start + low - at, start + high - at))
        at += stop - start
    return found


def without(ranges: Ranges, other: Ranges) -> Ranges:
    """What of the first is not in the second."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        at = start
        for begin, end in clipped(other, start, stop):
            if at < begin:
                found.append((at, begin))
            at = end
        if at < stop:
            found.append((at, stop))
    return tuple(found)
