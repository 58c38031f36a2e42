"""Which ranks go to which stage so that the fewest bytes move: the transportation problem, solved exactly.

Ranks that hold the same layers are interchangeable and form a group. From any seating that keeps the limits, ranks are
shifted along cycles that make it cheaper until there are none: then there is no cheaper seating (Klein 1967, "A primal
method for minimal cost flows"). The graph that is searched has a node per stage, so its size does not depend on the
number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
NEVER = 1 << 60


def cheapest_seats(
    cost: Integers, sizes: Sequence[int], least: Sequence[int], most: Sequence[int]
) -> tuple[Integers, int]:
    """How many of each group go to each stage, [groups, stages], and what that costs.

    cost: [groups, stages], what one rank of the group costs there. sizes: of the groups. least, most: ranks that each
    stage takes; the sizes' sum lies between their sums. Of equally cheap seatings it is always the same one.
    """
    assert sum(least) <= sum(sizes) <= sum(most), (sizes, least, most)
    stages = cost.shape[1]
    seats = _near(cost, sizes, least, most)
    edges = np.full((stages + 1, stages + 1), NEVER, np.int64)
    movers = np.zeros((stages, stages), np.int64)
    touched = list(range(stages))
    while True:
        filled = seats.sum(0)
        for stage in touched:
            there = np.where(seats[:, stage, None] > 0, cost - cost[:, stage, None], NEVER)
            movers[stage] = there.argmin(0)
            edges[stage, :stages] = there.min(0)
        edges[:stages, stages] = np.where(filled < most, 0, NEVER)  # may end here, one more than there was
        edges[stages, :stages] = np.where(filled > least, 0, NEVER)  # may begin here, one less
        cycle = _negative_cycle(edges)
        if not cycle:
            return seats, int((seats * cost).sum())
        steps = list(zip(cycle, (*cycle[1:], cycle[0]), strict=True))
        moves = [(movers[a, b], a, b) for a, b in steps if stages not in (a, b)]
        room = [int(seats[group, a]) for group, a, _ in moves]
        room += [int(most[a] - filled[a]) for a, b in steps if b == stages]
        room += [int(filled[b] - least[b]) for a, b in steps if a == stages]
        amount = min(room)
        for group, a, b in moves:
            seats[group, a] -= amount
            seats[group, b] += amount
        touched = [stage for stage in cycle if stage < stages]


def _near(cost: Integers, sizes: Sequence[int], least: Sequence[int], most: Sequence[int]) -> Integers:
    """A seating that keeps the limits, in which groups go where they regret little."""
    groups, stages = cost.shape
    seats = np.zeros((groups, stages), np.int64)
    left, filled = list(sizes), [0] * stages
    regret = (cost - cost.min(1)[:, None]).ravel()
    order = np.argsort(regret, kind="stable").tolist()
    for limits in (least, most):
        for at in order:
            group, stage = divmod(at, stages)
            some = min(left[group], limits[stage] - filled[stage])
            if some > 0:
                seats[group, stage] += some
                left[group] -= some
                filled[stage] += some
    return seats


def _negative_cycle(edges: Integers) -> list[int]:
    """Nodes along which the edges sum to less than zero, or none (Bellman 1958, Ford 1956).

    Ends as soon as the nodes from which others were reached form a cycle, which only negative ones do.
    """
    count = len(edges)
    nodes = np.arange(count)
    best = np.zeros(count, np.int64)
    before = np.full(count + 1, count)  # the last one stands for the begin, which is before itself
    for _ in range(count):
        through = best[:, None] + edges
        pick = through.argmin(0)
        value = through[pick, nodes]
        better = value < best
        if not better.any():
            return []
        before[:-1] = np.where(better, pick, before[:-1])
        best = np.where(better, value, best)
        far = before
        for _ in range(count.bit_length()):
            far = far[far]
        endless = far[far < count]
        if len(endless):
            return _around(before, int(endless[0]))
    raise AssertionError("shorter and shorter, and no cycle")


def _around(before: Integers, node: int) -> list[int]:
    cycle = [node]
    while int(before[cycle[-1]]) != node:
        cycle.append(int(before[cycle[-1]]))
    return cycle[::-1]
