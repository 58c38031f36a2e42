"""What is known of a model that is a chain of layers, and of the ranks that could hold it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .planner import SMALL_GAIN

NANO = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What each layer takes and weighs, in the order in which data goes through them."""

    layer_s: tuple[float, ...]
    """Forward and backward of one micro-batch on a rank of speed 1. Compared in whole nanoseconds, at least one."""
    layer_bytes: tuple[int, ...]
    """What a rank that holds the layer holds of it: parameters, gradients, optimizer. It moves with the layer."""

    def __post_init__(self) -> None:
        if not self.layer_s or not all(0 < each < float("inf") for each in self.layer_s):
            raise ValueError(
                f"layer_s={self.layer_s}: give the seconds of each layer, all above zero; there is no layer"
            )
        if len(self.layer_bytes) != len(self.layer_s) or min(self.layer_bytes) < 0:
            raise ValueError(
                f"layer_bytes={self.layer_bytes}: give bytes, zero or more, for each of {len(self.layer_s)} layers"
            )

    @property
    def layers(self) -> int:
        return len(self.layer_s)

    @property
    def layer_ns(self) -> tuple[int, ...]:
        return tuple(max(1, round(each * NANO)) for each in self.layer_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A rank that wants a seat."""

    speed: float = 1.0
    """It takes 1 / speed of a layer's seconds."""
    memory_bytes: int | None = None
    """For the bytes of its layers; None if no limit is known."""
    holds: tuple[int, int] | None = None
    """The layers first..stop-1, whose state it has; None if it has none."""

    def __post_init__(self) -> None:
        if not 1e-3 <= self.speed <= 1e3:
            raise ValueError(
                f"speed={self.speed} of a rank: give one between 0.001 and 1000, relative to a normal rank"
            )
        if self.holds is not None and not 0 <= self.holds[0] < self.holds[1]:
            raise ValueError(f"holds={self.holds} of a rank: give its first layer and the one after its last, or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Ranks that count as equal: the same memory, and speeds within SMALL_GAIN of each other."""

    speed: float
    """Of the slowest of them: what is promised for it holds for all."""
    memory_bytes: int | None
    ranks: tuple[int, ...]
    """Ascending."""


def predicted_s(costs: Costs, usual_speed: float, stages: Iterable[tuple[int, float]]) -> float:
    """What a step takes at least, and nearly: a stage begins when one micro-batch has come forward through the layers
    before it, and ends before the last one goes back through them. Messages are taken to cost nothing.

    usual_speed: that of most ranks; the layers before are taken to be on such. stages: of each its first layer, and
    how long that of its ranks computes which does so longest.
    """
    before_ns = (0, *accumulate(costs.layer_ns))
    return max(before_ns[first] / NANO / usual_speed + longest_s for first, longest_s in stages)


def kinds_of(ranks: Sequence[Rank], among: Iterable[int]) -> tuple[Kind, ...]:
    """The kinds of some ranks; the one with most of them first, then faster ones."""
    tops: dict[int | None, float] = {}
    found: dict[tuple[int | None, float], list[int]] = {}
    for index in sorted(among, key=lambda index: (-ranks[index].speed, index)):
        rank = ranks[index]
        if rank.speed * (1 + SMALL_GAIN) < tops.get(rank.memory_bytes, float("inf")):
            tops[rank.memory_bytes] = rank.speed
        found.setdefault((rank.memory_bytes, tops[rank.memory_bytes]), []).append(index)
    kinds = [
        Kind(speed=ranks[indices[-1]].speed, memory_bytes=memory, ranks=tuple(sorted(indices)))
        for (memory, _), indices in found.items()
    ]
    return tuple(sorted(kinds, key=lambda kind: (-len(kind.ranks), -kind.speed, kind.ranks[0])))
