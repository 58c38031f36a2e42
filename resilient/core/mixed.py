"""Stages for ranks of so many kinds that trying how many of each a stage gets would be too dear.

Two answers, of which the faster one is taken:

- *Spread*: layers are cut as for ranks of the mean speed, and each stage gets its part of the fast and of the slow
  ones. Good when a stage has many ranks, whose speeds simply add up. No bound is promised.
- *Counted*: slow ranks count for nothing when layers are cut, and sit down wherever one micro-batch is done in time.
  Good when there are few of them. The time is at most (1 + SMALL_GAIN) times the least for the others alone, at the
  speed of the slowest of these. Not tried when those would do less than `MOST` of what all could.

All ranks are taken to have the memory of the smallest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .chain import Costs, Kind, Rank
from .cuts import Cutting, Quota
from .movement import Movement, Seated

MOST = 0.75


def mixed(
    costs: Costs, ranks: Sequence[Rank], kinds: Sequence[Kind], counts: range, micro_batches: int, slack: float
) -> Iterator[Seated]:
    """The answers that there are; none if nothing fits into memory."""
    among = sorted(index for kind in kinds for index in kind.ranks)
    mean = sum(ranks[index].speed for index in among) / len(among)
    spread = _alike(costs, ranks, _as_one(kinds, among, mean), counts, micro_batches, slack)
    if spread:
        seated, _, _ = spread
        yield Movement(costs, ranks, kinds).by_kind(seated.cut, [len(each) for each in seated.ranks])
    fast, slow = _counted(ranks, kinds, among)
    if slow.ranks and len(fast.ranks) * fast.speed >= MOST * mean * len(among):
        alone = _alike(costs, ranks, fast, counts, micro_batches, slack)
        beside = alone and _beside(costs, ranks, *alone, slow)
        if beside:
            yield beside


def _alike(
    costs: Costs, ranks: Sequence[Rank], kind: Kind, counts: range, micro_batches: int, slack: float
) -> tuple[Seated, Cutting, int] | None:
    """A single kind, seated; and the time that it has."""
    if len(kind.ranks) < counts[0]:
        return None
    cutting = Cutting(costs, (kind,), micro_batches, counts[-1])
    least_ns = cutting.least_ns(counts)
    if least_ns is None:
        return None
    limit_ns = int(least_ns * (1 + slack))
    return Movement(costs, ranks, (kind,)).least(cutting, limit_ns, counts), cutting, limit_ns


def _beside(
    costs: Costs, ranks: Sequence[Rank], seated: Seated, cutting: Cutting, limit_ns: int, slow: Kind
) -> Seated | None:
    """The slow ones added where there is a micro-batch left for each, and time for it; None if there is not."""
    slower = cutting.kinds[0].speed / slow.speed
    most = [
        cutting.micro_batches - len(there)
        if cutting.before_ns[first] + sum(costs.layer_ns[first:stop]) * slower <= limit_ns
        else 0
        for first, stop, there in zip(seated.cut, seated.cut[1:], seated.ranks, strict=False)
    ]
    if sum(most) < len(slow.ranks) or sum(map(len, seated.ranks)) < len(cutting.kinds[0].ranks):
        return None
    quota = Quota(least=[[0] * len(most)], most=[most])
    others = Movement(costs, ranks, (slow,)).seat(seated.cut, quota)
    return Seated(
        moved_bytes=seated.moved_bytes + others.moved_bytes,
        cut=seated.cut,
        ranks=tuple(tuple(sorted(one + other)) for one, other in zip(seated.ranks, others.ranks, strict=True)),
    )


def _counted(ranks: Sequence[Rank], kinds: Sequence[Kind], among: Sequence[int]) -> tuple[Kind, Kind]:
    """Those that count, all at the speed of the slowest of them, and the rest: so that the first do most."""
    falling = sorted(among, key=lambda index: (-ranks[index].speed, index))
    _, count = max((at * ranks[index].speed, at) for at, index in enumerate(falling, 1))
    slowest = ranks[falling[-1]].speed
    fast = _as_one(kinds, sorted(falling[:count]), ranks[falling[count - 1]].speed)
    return fast, _as_one(kinds, sorted(falling[count:]), slowest)


def _as_one(kinds: Sequence[Kind], among: Sequence[int], speed: float) -> Kind:
    limits = [kind.memory_bytes for kind in kinds if kind.memory_bytes is not None]
    return Kind(speed=speed, memory_bytes=min(limits, default=None), ranks=tuple(among))
