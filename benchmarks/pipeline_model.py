"""What a step of a pipeline takes, computed: a bound that no schedule beats, and a simulation of ours.

Layers all cost the same here; a rank's time for a micro-batch is its stage's number of layers times that.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from resilient.core.chain import Costs, Rank
from resilient.core.partition import partition
from resilient.core.planner import even_runs
from resilient.core.schedule import Backward, Forward, Kind, choose, turns_of, under_way_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    forward_s: float
    backward_s: float

    @property
    def both_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True)
class Split:
    """Of each stage, how many layers it has, and how many ranks."""

    layers: tuple[int, ...]
    ranks: tuple[int, ...]


def bound_s(split: Split, micro_batches: int, layer: Layer) -> float:
    """No step is shorter: the busiest rank of a stage computes all of its micro-batches, after the first one has come
    forward through the stages before it, and before the last one has gone back through them."""
    before, found = 0.0, 0.0
    for layers, ranks in zip(split.layers, split.ranks, strict=True):
        found = max(found, before + -(-micro_batches // ranks) * layers * layer.both_s)
        before += layers * layer.both_s
    return max(found, before)


def best_s(layers: int, ranks: int, counts: range, micro_batches: int, layer: Layer, most: int) -> float:
    """The least bound of all splits into one of these numbers of stages. most: layers that a rank may hold."""
    return min(
        bound_s(split, micro_batches, layer)
        for count in counts
        for split in splits(layers, ranks, count)
        if max(split.ranks) <= micro_batches and max(split.layers) <= most
    )


def planned(
    layers: int,
    ranks: int,
    stages: int,
    micro_batches: int,
    layer: Layer,
    *,
    slack: float = 0.0,
    most: int | None = None,
) -> Split:
    """As ours is planned from nothing. most: layers that a rank may hold."""
    costs = Costs(layer_s=(layer.both_s,) * layers, layer_bytes=(1,) * layers)
    them = [Rank(memory_bytes=most)] * ranks
    found = partition(costs, them, stages=stages, micro_batches=micro_batches, slack=slack)
    return widths([(stage.first, stage.stop, len(stage.ranks)) for stage in found.stages])


def splits(layers: int, ranks: int, stages: int) -> Iterator[Split]:
    for cut in _compositions(layers, stages):
        for dealt in _compositions(ranks, stages):
            yield Split(cut, dealt)


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, total), parts - 1):
        yield tuple(stop - start for start, stop in itertools.pairwise((0, *cuts, total)))


@dataclass(slots=True)
class _Rank:
    stage: int
    fresh: set[int]
    under_way: set[int] = field(default_factory=set)
    busy: bool = False


def simulated_s(split: Split, micro_batches: int, layer: Layer, kind: Kind = "1f1b", message_s: float = 0.0) -> float:
    """A step by our schedule; each message between stages takes so long."""
    return _Step(split, micro_batches, layer, kind, message_s).run()


class _Step:
    def __init__(self, split: Split, micro_batches: int, layer: Layer, kind: Kind, message_s: float) -> None:
        self._split, self._micro_batches, self._layer = split, micro_batches, layer
        self._kind, self._message_s = kind, message_s
        self._sizes = list(zip(split.layers, split.ranks, strict=True))
        self._ranks = [
            _Rank(stage, set(run)) for stage, ranks in enumerate(split.ranks) for run in even_runs(micro_batches, ranks)
        ]
        self._inputs = [set(range(micro_batches)), *(set[int]() for _ in split.ranks[1:])]
        self._gradients = [set[int]() for _ in split.ranks]
        self._turns = turns_of(micro_batches)
        self._owners = [dict[int, int]() for _ in split.ranks]
        for number, rank in enumerate(self._ranks):
            self._owners[rank.stage] |= dict.fromkeys(rank.fresh, number)
        self._events: list[tuple[float, int, str, int, int]] = []
        self._serial = itertools.count()

    def run(self) -> float:
        now = 0.0
        for number in range(len(self._ranks)):
            self._begin(number, now)
        while self._events:
            now, _, what, where, leaf = heapq.heappop(self._events)
            if what == "done":
                number = where
                self._ranks[number].busy = False
            else:
                number = self._owners[where][leaf]
                (self._inputs if what == "forward" else self._gradients)[where].add(leaf)
            self._begin(number, now)
        assert not any(rank.fresh or rank.under_way for rank in self._ranks)
        return now

    def _begin(self, number: int, now: float) -> None:
        rank = self._ranks[number]
        if rank.busy:
            return
        stage, layers = rank.stage, self._split.layers[rank.stage]
        last = stage == len(self._split.ranks) - 1
        action = choose(
            under_way_limit(self._kind, self._sizes[stage:], self._micro_batches),
            fresh=rank.fresh,
            under_way=rank.under_way,
            inputs=self._inputs[stage],
            gradients=self._gradients[stage],
            turns=self._turns,
        )
        match action:
            case Forward(leaf=leaf):
                rank.fresh.remove(leaf)
                took_s = layers * (self._layer.both_s if last else self._layer.forward_s)
                if not last:
                    rank.under_way.add(leaf)
                    self._at(now + took_s + self._message_s, "forward", stage + 1, leaf)
                elif stage:
                    self._at(now + took_s + self._message_s, "backward", stage - 1, leaf)
            case Backward(leaf=leaf):
                rank.under_way.remove(leaf)
                took_s = layers * self._layer.backward_s
                if stage:
                    self._at(now + took_s + self._message_s, "backward", stage - 1, leaf)
            case _:
                return
        rank.busy = True
        self._at(now + took_s, "done", number, leaf)

    def _at(self, when: float, what: str, where: int, leaf: int) -> None:
        heapq.heappush(self._events, (when, next(self._serial), what, where, leaf))


def widths(stages: Sequence[tuple[int, int, int]]) -> Split:
    """Of (first layer, one after the last, ranks) by stage."""
    return Split(tuple(stop - first for first, stop, _ in stages), tuple(ranks for _, _, ranks in stages))
