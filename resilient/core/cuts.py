"""Where a chain of layers is cut into stages so that a step takes as little time as can be.

A stage [first, stop) has nothing to do until a micro-batch has come forward through the layers before it, and the
last one has to go back through them: of a time T it has what is left when one micro-batch has been through those
(`chain.predicted_s`). In that each of its ranks can do a whole number of micro-batches, so the stage needs a certain
number of ranks, and the fewest ranks for the layers before each layer follow from those before it (dynamic
programming over layers). T is allowed when no more ranks are needed than there are; the smallest such T is found by
bisection. What it costs does not depend on the number of ranks, only on that of kinds: ranks of the kind with most are
counted, and for all others it is tried how many of them each stage gets. That suits what is normal, two or three slow
ranks among many alike; `Cutting.affordable` says when it would be too dear.

Times are whole nanoseconds on a rank of the first kind. Matrices are indexed [stop, first].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product

import numpy as np

from .chain import Costs, Kind
from .seating import NEVER, Integers

Cut = tuple[int, ...]
"""Where stages begin and end: 0, the first layer of the second stage, ..., the number of layers."""
Placed = tuple[int, ...]
"""How many of each rare kind a stage has. The first entry is of the first kind: one rank of it is placed too, without
which stages might be chosen in which none of its ranks is done in time; or all are, where seats may become scarce."""
AFFORDABLE = 4_000_000
"""Additions in the dynamic programming for one T; some milliseconds, and there are tens of T. The controller waits."""
STEP = 5000
"""As many take as long as what one step of it costs beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """How many ranks each stage takes, [kinds][stages]."""

    least: list[list[int]]
    most: list[list[int]]


class Cutting:
    """Layers, kinds of ranks, and micro-batches; asked what a time T allows."""

    def __init__(self, costs: Costs, kinds: Sequence[Kind], micro_batches: int, stages: int) -> None:
        self.kinds, self.layers, self.micro_batches = kinds, costs.layers, micro_batches
        ends = np.array([0, *accumulate(costs.layer_ns)], np.int64)
        self.before_ns = ends
        """By first layer of a stage: what one micro-batch takes in the layers before it, all on ranks of this kind."""
        weights = np.array([0, *accumulate(costs.layer_bytes)], np.int64)
        stage_bytes = weights[:, None] - weights[None, :]
        self.leaf_ns: list[Integers] = []
        for kind in kinds:
            slower = kinds[0].speed / kind.speed
            leaf_ns = ends[:, None] - ends[None, :]
            none = leaf_ns <= 0
            if kind is not kinds[0]:
                leaf_ns = np.ceil(leaf_ns * slower).astype(np.int64)
            fits = True if kind.memory_bytes is None else stage_bytes <= kind.memory_bytes
            self.leaf_ns.append(np.where(~none & fits, leaf_ns, NEVER))
        self.slowest_kind = max(kinds[0].speed / kind.speed for kind in kinds)
        self.model_ns = int(ends[-1])
        many, *few = (len(kind.ranks) for kind in kinds)
        self.rare: Placed = (1, *few) if few else ()
        self.affordable = self._affordable(self.rare, stages)
        better = any(bool((leaf_ns < self.leaf_ns[0]).any()) for leaf_ns in self.leaf_ns[1:])
        if better and many + sum(few) > micro_batches and self._affordable((many, *few), stages):
            self.rare = (many, *few)
        self.counted = many - sum(self.rare[:1])

    def _affordable(self, rare: Placed, stages: int) -> bool:
        choices = 1
        for count in rare:
            choices *= (count + 1) * (count + 2) // 2
        return choices * stages * (self.layers**2 + STEP) <= AFFORDABLE

    def least_ns(self, counts: range) -> int | None:
        """The smallest T that allows one of these numbers of stages, or None if memory allows none.

        With several kinds at most a thousandth more than that.
        """
        worst = int(self.micro_batches * self.model_ns * self.slowest_kind) + self.micro_batches + self.model_ns
        if self.allowed(worst, counts) is None:
            return None
        power = sum(len(kind.ranks) * kind.speed / self.kinds[0].speed for kind in self.kinds)
        low = max(0, int(self.micro_batches * self.model_ns / power * (1 - 1e-9)) - 1)  # not allowed
        gap = low // 16 + 1
        while low + gap < worst and self.allowed(low + gap, counts) is None:
            low, gap = low + gap, 2 * gap
        high = min(low + gap, worst)
        while high - low > 1 + (high >> 10 if self.rare else 0):
            middle = (low + high) // 2
            if self.allowed(middle, counts) is None:
                low = middle
            else:
                high = middle
        return high

    def allowed(self, limit_ns: int, counts: range) -> Cut | None:
        """A cut into one of these numbers of stages with which all are done in T, or None if none is found."""
        needs = self.needs(limit_ns)
        reached = self._reached(needs, counts[-1])
        for count in counts:
            if reached[count][self.rare][-1] <= self.counted:
                cut = self._followed(needs, reached[: count + 1])
                if self.quota(limit_ns, cut, self.placed(limit_ns, cut)) is not None:
                    return cut
        return None

    def needs(self, limit_ns: int) -> dict[Placed, Integers]:
        """For each way to place rare kinds on a stage, the ranks of the first kind that it needs beside them."""
        left_ns = np.maximum(limit_ns - self.before_ns, 0)
        return self._needs([left_ns[None, :] // leaf_ns for leaf_ns in self.leaf_ns])

    def _needs(self, whole: Sequence[Integers]) -> dict[Placed, Integers]:
        """whole: for each kind the micro-batches that one of its ranks does in time, by stage."""
        needs: dict[Placed, Integers] = {}
        for placed in product(*(range(count + 1) for count in self.rare)):
            if sum(placed) > self.micro_batches:
                continue
            lacking = np.full(whole[0].shape, self.micro_batches, np.int64)
            for count, done in zip(placed, whole, strict=False):
                lacking -= count * done
            need = np.where(whole[0] > 0, -(-lacking // np.maximum(whole[0], 1)), np.where(lacking > 0, NEVER, 0))
            for count, done in zip(placed, whole, strict=False):
                if count:
                    need = np.where(done > 0, need, NEVER)
            needs[placed] = np.maximum(need, 0)
        return needs

    def _reached(self, needs: dict[Placed, Integers], stages: int) -> list[dict[Placed, Integers]]:
        """By number of stages and rare ranks used: the fewest of the first kind that hold the layers before each."""
        nothing = np.full(self.layers + 1, NEVER, np.int64)
        nothing[0] = 0
        reached = [{tuple(0 for _ in self.rare): nothing}]
        for _ in range(stages):
            after: dict[Placed, Integers] = {}
            for used, fewest in reached[-1].items():
                for placed, need in needs.items():
                    both = _sum(used, placed)
                    if _within(both, self.rare):
                        most = np.minimum((fewest[None, :] + need).min(1), NEVER)
                        after[both] = np.minimum(after[both], most) if both in after else most
            reached.append(after)
        return reached

    def _followed(self, needs: dict[Placed, Integers], reached: Sequence[dict[Placed, Integers]]) -> Cut:
        """Back from the last layer: the cut that needs so few."""
        used, stop = self.rare, self.layers
        cut = [stop]
        for before, after in zip(reversed(reached[:-1]), reversed(reached[1:]), strict=True):
            used, stop = self._step(needs, before, used, stop, int(after[used][stop]))
            cut.append(stop)
        return tuple(reversed(cut))

    def _step(
        self, needs: dict[Placed, Integers], before: dict[Placed, Integers], used: Placed, stop: int, fewest: int
    ) -> tuple[Placed, int]:
        for placed, need in needs.items():
            left = tuple(a - b for a, b in zip(used, placed, strict=True))
            if left in before:
                found = np.flatnonzero(before[left] + need[stop] == fewest)
                if len(found):
                    return left, int(found[0])
        raise AssertionError((used, stop, fewest))

    # For a given cut

    def placed(self, limit_ns: int, cut: Cut) -> list[Placed] | None:
        """Rare ranks for each stage with which the fewest of the first kind are needed, or None if T is too short."""
        if not self.rare:
            return [()] * (len(cut) - 1)
        needs = {each: need.tolist() for each, need in self._needs(self._whole(limit_ns, cut)).items()}
        best: dict[Placed, tuple[int, tuple[Placed, ...]]] = {tuple(0 for _ in self.rare): (0, ())}
        for stage in range(len(cut) - 1):
            after: dict[Placed, tuple[int, tuple[Placed, ...]]] = {}
            for used, (fewest, path) in best.items():
                for each, need in needs.items():
                    both = _sum(used, each)
                    if _within(both, self.rare) and fewest + need[stage] < NEVER:
                        after[both] = min(after.get(both, (NEVER, ())), (fewest + need[stage], (*path, each)))
            best = after
        fewest, path = best.get(self.rare, (NEVER, ()))
        return list(path) if fewest <= self.counted else None

    def quota(self, limit_ns: int, cut: Cut, placed: Sequence[Placed] | None) -> Quota | None:
        """The ranks of each kind that each stage takes when rare ones are placed so; None if T is too short for it.

        Everybody has one micro-batch at least. Of a single kind some may be left over, when there are more than seats.
        """
        if placed is None:
            return None
        least: list[list[int]] = [[] for _ in self.kinds]
        most: list[list[int]] = [[] for _ in self.kinds]
        for rare, *whole in zip(placed, *(each.tolist() for each in self._whole(limit_ns, cut)), strict=True):
            others = rare[1:]
            lacking = self.micro_batches - sum(count * done for count, done in zip(others, whole[1:], strict=True))
            if any(count and not done for count, done in zip(others, whole[1:], strict=True)):
                return None
            if lacking > 0 and not whole[0]:
                return None
            fewest = -(-max(0, lacking) // whole[0]) if whole[0] else 0
            room = self.micro_batches - sum(others)
            if room < fewest:
                return None
            for kind, count in enumerate((fewest, *others)):
                least[kind].append(count)
            for kind, count in enumerate((room if whole[0] else 0, *others)):
                most[kind].append(count)
        ranks = len(self.kinds[0].ranks)
        fits = sum(least[0]) <= ranks and (not self.rare or ranks <= sum(most[0]))
        return Quota(least=least, most=most) if fits else None

    def _whole(self, limit_ns: int, cut: Cut) -> list[Integers]:
        firsts, stops = list(cut[:-1]), list(cut[1:])
        left_ns = np.maximum(limit_ns - self.before_ns[firsts], 0)
        return [left_ns // leaf_ns[stops, firsts] for leaf_ns in self.leaf_ns]


def _sum(one: Placed, other: Placed) -> Placed:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _within(some: Placed, there_are: Placed) -> bool:
    return all(a <= b for a, b in zip(some, there_are, strict=True))
