"""Among the cuts that a time allows, the one with which the fewest bytes move, and who sits where then.

Exact for ranks of one kind when there are at most `EVERY` cuts: all are tried, and each is seated as cheaply as can
be. Otherwise three cuts are: where stages are cut now, one that needs few ranks, and the best one if ranks did not
compete for stages; the best of them is improved by shifting its boundaries, `LOOKS` times at most. With several kinds,
rare ranks stay where they are if the time allows that; otherwise the fewest of the common kind are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, combinations, islice, pairwise
from math import comb

import numpy as np

from .chain import Costs, Kind, Rank
from .cuts import Cut, Cutting, Quota
from .seating import NEVER, Integers, cheapest_seats

EVERY = 256
LOOKS = 40
GROUPS = 64
"""So many of the largest groups count when ranks don't compete."""
HALVINGS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Seated:
    moved_bytes: int
    cut: Cut
    ranks: tuple[tuple[int, ...], ...]
    """Of each stage, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ranks of one kind that hold the same."""

    holds: tuple[int, int]
    ranks: tuple[int, ...]


class Movement:
    """Costs, and ranks by what they hold."""

    def __init__(self, costs: Costs, ranks: Sequence[Rank], kinds: Sequence[Kind]) -> None:
        self.layers = costs.layers
        self.weights = np.array([0, *accumulate(costs.layer_bytes)], np.int64)
        self.groups = [_groups(ranks, kind.ranks) for kind in kinds]

    def least(self, cutting: Cutting, limit_ns: int, counts: range) -> Seated:
        """The seating with which the fewest bytes move. There is one: T allows one of these numbers of stages."""
        if sum(comb(self.layers - 1, count - 1) for count in counts) <= EVERY:
            found = [self._seated(cutting, limit_ns, cut) for cut in _every(self.layers, counts)]
        else:
            found = [self._improved(cutting, limit_ns, counts)]
        best = min((each for each in found if each), key=lambda each: (each.moved_bytes, each.cut), default=None)
        assert best, (limit_ns, counts)
        return best

    def by_kind(self, cut: Cut, stage_ranks: Sequence[int]) -> Seated:
        """Each kind is spread over the stages in proportion to their ranks: all are about as fast as the mean."""
        seats = sorted((at / ranks, stage) for stage, ranks in enumerate(stage_ranks) for at in range(ranks))
        stages, start = range(len(stage_ranks)), 0
        counts = []
        for groups in self.groups:
            stop = start + sum(len(group.ranks) for group in groups)
            taken = np.bincount([stage for _, stage in seats[start:stop]], minlength=len(stages))
            counts.append(taken.tolist())
            start = stop
        return self.seat(cut, Quota(least=counts, most=counts))

    # One cut

    def _seated(self, cutting: Cutting, limit_ns: int, cut: Cut) -> Seated | None:
        quota = cutting.quota(limit_ns, cut, self._at_home(cut))
        if quota is None and cutting.rare:
            quota = cutting.quota(limit_ns, cut, cutting.placed(limit_ns, cut))
        return self.seat(cut, quota) if quota else None

    def _at_home(self, cut: Cut) -> list[tuple[int, ...]]:
        """How many of each rare kind each stage has if they go where they hold most."""
        counts = np.zeros((len(self.groups), len(cut) - 1), np.int64)
        for kind, groups in enumerate(self.groups[1:], 1):
            homes = self._costs(cut, groups).argmin(1)
            np.add.at(counts[kind], homes, [len(group.ranks) for group in groups])
        return [tuple(column) if len(column) > 1 else () for column in counts.T.tolist()]

    def seat(self, cut: Cut, quota: Quota) -> Seated:
        """Every kind as cheaply as can be within its quota. Whoever has no seat in it stays unseated."""
        stages = len(cut) - 1
        ranks: list[list[int]] = [[] for _ in range(stages)]
        moved = 0
        for groups, least, most in zip(self.groups, quota.least, quota.most, strict=True):
            sizes = [len(group.ranks) for group in groups]
            spare = max(0, sum(sizes) - sum(most))
            costs = np.pad(self._costs(cut, groups), ((0, 0), (0, 1)))  # unseated, nothing moves
            seats, cost = cheapest_seats(costs, sizes, [*least, spare], [*most, spare])
            moved += cost
            for group, counts in zip(groups, seats.tolist(), strict=True):
                left = iter(group.ranks)
                for stage in range(stages):
                    ranks[stage] += islice(left, counts[stage])
        return Seated(moved_bytes=moved, cut=cut, ranks=tuple(tuple(sorted(each)) for each in ranks))

    def _costs(self, cut: Cut, groups: Sequence[Group]) -> Integers:
        """What one rank of each group has to receive at each stage, [groups, stages]."""
        firsts, stops = np.array(cut[:-1]), np.array(cut[1:])
        needed: Integers = self.weights[stops] - self.weights[firsts]
        return needed - self._kept(groups, firsts, stops)

    def _kept(self, groups: Sequence[Group], firsts: Integers, stops: Integers) -> Integers:
        """Bytes of the layers first..stop-1 that a rank of each group holds, [groups, *shape of firsts]."""
        held = np.array([group.holds for group in groups]).reshape(len(groups), 2, *(1 for _ in firsts.shape))
        until = self.weights[np.minimum(stops, held[:, 1])]
        kept: Integers = np.maximum(0, until - self.weights[np.maximum(firsts, held[:, 0])])
        return kept

    # Many cuts

    def _improved(self, cutting: Cutting, limit_ns: int, counts: range) -> Seated | None:
        alone, need = self._alone(cutting, limit_ns)
        first = cutting.allowed(limit_ns, counts)
        cuts = [first, self._now(counts), self._uncontested(alone, need, counts)]
        tried = {cut: self._seated(cutting, limit_ns, cut) for cut in cuts if cut}
        found = [each for each in tried.values() if each]
        best = min(found, key=lambda each: (each.moved_bytes, each.cut), default=None)
        looks = LOOKS * GROUPS // max(GROUPS, sum(map(len, self.groups)))  # a look takes longer with more groups
        stuck = False
        while best and looks and not stuck:
            stuck = True
            for cut in _shifted(best.cut):
                hope = sum(int(alone[stop, first]) for first, stop in pairwise(cut))
                if cut in tried or hope >= best.moved_bytes:
                    continue
                tried[cut] = other = self._seated(cutting, limit_ns, cut)
                looks -= 1
                if other and other.moved_bytes < best.moved_bytes:
                    best, stuck = other, False
                if not looks or not stuck:
                    break
        return best

    def _now(self, counts: range) -> Cut | None:
        """Where stages begin and end now, if that is a number of stages that is asked for."""
        ends = {end for group in chain(*self.groups) for end in group.holds if group.holds != (0, 0)}
        cut = tuple(sorted(ends | {0, self.layers}))
        return cut if len(cut) - 1 in counts else None

    def _alone(self, cutting: Cutting, limit_ns: int) -> tuple[Integers, Integers]:
        """For each stage what has to move if it had the first choice, and the ranks that it needs, [stop, first].

        No seating is cheaper than the sum over its stages, as long as all ranks are of one kind.
        """
        need = next(iter(cutting.needs(limit_ns).values()))
        groups = sorted(chain(*self.groups), key=lambda group: (-len(group.ranks), group.holds))[:GROUPS]
        stops, firsts = np.meshgrid(np.arange(len(need)), np.arange(len(need)), indexing="ij")
        kept = self._kept(groups, firsts, stops)
        order = np.argsort(-kept, axis=0, kind="stable")
        sizes = np.array([len(group.ranks) for group in groups])[order]
        there = np.cumsum(sizes, axis=0) - sizes
        saved = (np.take_along_axis(kept, order, 0) * np.clip(need - there, 0, sizes)).sum(0)
        possible = need < NEVER
        stage_bytes = np.where(possible, self.weights[stops] - self.weights[firsts], 0)
        return np.where(possible, stage_bytes * np.where(possible, need, 0) - saved, NEVER), need

    def _uncontested(self, alone: Integers, need: Integers, counts: range) -> Cut | None:
        """The cut with the least sum of what each stage would cost alone, and no more ranks than there are.

        Needing a rank is given a price, as low as it can be (Lagrange).
        """
        ranks = sum(len(group.ranks) for group in chain(*self.groups))
        found = _cheapest_cut(alone, need, 0, counts, ranks)
        low, high = 0, int(self.weights[-1]) + 1
        for _ in range(0 if found else HALVINGS):
            middle = (low + high) // 2
            cut = _cheapest_cut(alone, need, middle, counts, ranks)
            low, high = (low, middle) if cut else (middle, high)
            found = cut or found
        return found


def _cheapest_cut(alone: Integers, need: Integers, price: int, counts: range, ranks: int) -> Cut | None:
    possible = need < NEVER
    cost = np.where(possible, alone + price * np.where(possible, need, 0), NEVER)
    least = np.full(len(cost), NEVER, np.int64)
    least[0] = 0
    picks, found = [], []
    for count in range(1, counts[-1] + 1):
        through = least[None, :] + cost
        picks.append(through.argmin(1))
        least = np.minimum(through.min(1), NEVER)
        if count in counts and least[-1] < NEVER:
            cut = [len(cost) - 1]
            for pick in reversed(picks):
                cut.append(int(pick[cut[-1]]))
            cut.reverse()
            if int(need[cut[1:], cut[:-1]].sum()) <= ranks:
                found.append((int(least[-1]), tuple(cut)))
    return min(found)[1] if found else None


def _every(layers: int, counts: Iterable[int]) -> Iterator[Cut]:
    for count in counts:
        for inner in combinations(range(1, layers), count - 1):
            yield (0, *inner, layers)


def _shifted(cut: Cut) -> Iterator[Cut]:
    for at in range(1, len(cut) - 1):
        for end in (cut[at] - 1, cut[at] + 1):
            if cut[at - 1] < end < cut[at + 1]:
                yield (*cut[:at], end, *cut[at + 1 :])


def _groups(ranks: Sequence[Rank], among: Iterable[int]) -> list[Group]:
    found: dict[tuple[int, int], list[int]] = {}
    for index in among:
        found.setdefault(ranks[index].holds or (0, 0), []).append(index)
    return [Group(holds=holds, ranks=tuple(indices)) for holds, indices in sorted(found.items())]
