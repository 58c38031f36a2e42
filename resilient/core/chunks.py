"""Which rank of a stage owns which chunk of optimizer state: evenly by bytes, and with little movement.

Chunks are the unit: their cuts are fixed by the state alone, and they change owner one by one. The ranks are those of
one stage; all of them hold its parameters, each updates the chunks that it owns.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import accumulate


def chunk_owners(
    chunk_bytes: Sequence[int], ranks: Sequence[int], former: Sequence[int | None] = ()
) -> tuple[int, ...]:
    """The rank that owns each chunk.

    chunk_bytes: of each chunk, more than none. ranks: without doubles; their order decides between equals.
    former: each chunk's owner so far, who may be gone, or None; left out when there is none.

    Without former owners the chunks of a rank follow each other, and the largest sum of bytes is as small as it can be
    (some ranks have none where chunks are few). With them, nobody has more than an even share and the largest chunk,
    and what moves is less than one chunk, for each rank that had more than that, above the least that can move; it is
    the least where all chunks have the same size.
    """
    assert ranks and len(set(ranks)) == len(ranks), ranks
    assert all(size > 0 for size in chunk_bytes), "a chunk of no bytes"
    assert len(former) in (0, len(chunk_bytes)), (len(former), len(chunk_bytes))
    if not chunk_bytes:
        return ()
    living = set(ranks)
    kept = [owner if owner in living else None for owner in former]
    return (
        _in_runs(chunk_bytes, ranks) if not any(each is not None for each in kept) else _moved(chunk_bytes, ranks, kept)
    )


def most_bytes(chunk_bytes: Sequence[int], ranks: int) -> int:
    """What nobody exceeds when chunks are dealt anew to former owners: an even share and the largest chunk."""
    return -(-sum(chunk_bytes) // ranks) + max(chunk_bytes)


# Without former owners


def _in_runs(chunk_bytes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Runs whose largest is as small as it can be; among those each is as near as possible to an even rest."""
    ends = list(accumulate(chunk_bytes))
    limit = _least_limit(ends, max(chunk_bytes), len(ranks))
    fewest = _fewest_runs(chunk_bytes, limit)
    owners: list[int] = []
    at = done = 0
    for position, rank in enumerate(ranks):
        left = len(ranks) - position
        even = done + (ends[-1] - done) / left
        stop = at
        while stop < len(chunk_bytes) and ends[stop] - done <= limit:
            nearer = abs(ends[stop] - even) <= abs((ends[stop - 1] if stop else 0) - even)
            if not nearer and fewest[stop] <= left - 1:
                break
            stop += 1
        owners += [rank] * (stop - at)
        at, done = stop, ends[stop - 1] if stop else 0
    assert len(owners) == len(chunk_bytes), (limit, owners)
    return tuple(owners)


def _least_limit(ends: Sequence[int], largest: int, ranks: int) -> int:
    low, high = max(largest, -(-ends[-1] // ranks)), ends[-1]
    while low < high:
        middle = (low + high) // 2
        if _enough(ends, middle, ranks):
            high = middle
        else:
            low = middle + 1
    return low


def _enough(ends: Sequence[int], limit: int, ranks: int) -> bool:
    """Whether so many runs of at most `limit` bytes hold all chunks."""
    done = 0
    for _ in range(ranks):
        if done + limit >= ends[-1]:
            return True
        done = ends[bisect(ends, done + limit) - 1]
    return False


def _fewest_runs(chunk_bytes: Sequence[int], limit: int) -> list[int]:
    """From each chunk on, the fewest runs of at most `limit` bytes that hold the rest."""
    count = len(chunk_bytes)
    fewest = [0] * (count + 1)
    inside, stop = 0, count
    for start in reversed(range(count)):
        inside += chunk_bytes[start]
        while inside > limit:
            stop -= 1
            inside -= chunk_bytes[stop]
        fewest[start] = fewest[stop] + 1
    return fewest


# With former owners


def _moved(chunk_bytes: Sequence[int], ranks: Sequence[int], kept: list[int | None]) -> tuple[int, ...]:
    """Those with too much give chunks away; what has no owner goes, in order, to whoever has least.

    It always fits: whoever has least has no more than an even share of what is dealt already.
    """
    limit = most_bytes(chunk_bytes, len(ranks))
    owned: dict[int, list[int]] = {rank: [] for rank in ranks}
    for chunk, owner in enumerate(kept):
        if owner is not None:
            owned[owner].append(chunk)
    for chunks in owned.values():
        for chunk in _given_away(chunk_bytes, chunks, limit):
            kept[chunk] = None
    loads = dict.fromkeys(ranks, 0)
    for chunk, owner in enumerate(kept):
        if owner is not None:
            loads[owner] += chunk_bytes[chunk]
    least = [(loads[rank], position) for position, rank in enumerate(ranks)]
    heapify(least)
    owners: list[int] = []
    for chunk, owner in enumerate(kept):
        if owner is None:
            load, position = least[0]
            owner = ranks[position]  # noqa: PLW2901
            heapreplace(least, (load + chunk_bytes[chunk], position))
        owners.append(owner)
    return tuple(owners)


def _given_away(chunk_bytes: Sequence[int], chunks: Sequence[int], limit: int) -> list[int]:
    """What a rank gives away to have no more than the limit: large chunks first while they don't exceed what is too
    much, then the smallest one that covers the rest; of equals the last, so that what stays is in fewer pieces."""
    excess = sum(chunk_bytes[chunk] for chunk in chunks) - limit
    given: list[int] = []
    for chunk in sorted(chunks, key=lambda chunk: (-chunk_bytes[chunk], -chunk)):
        if chunk_bytes[chunk] <= excess:
            given.append(chunk)
            excess -= chunk_bytes[chunk]
    if excess > 0:
        rest = sorted(set(chunks) - set(given), key=lambda chunk: (chunk_bytes[chunk], -chunk))
        given.append(next(chunk for chunk in rest if chunk_bytes[chunk] >= excess))
    return given
