"""A pipeline's stages for the ranks that there are, by what its layers have been measured to take. Pure.

Before anything has run a layer is taken to cost what its parameters weigh. Then every rank tells what its own layers
take. Where two ranks have measured the same layer, now or earlier, that tells how fast the ranks are; where they have
not, a slow rank and a costly layer look the same, and lighten the same stage.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .chain import Costs, Rank, kinds_of, predicted_s
from .events import PipelineShape
from .partition import DoesNotFit, partition
from .plan import Plan, Stage

Measured = Mapping[tuple[int, int], float]
"""By (member, layer), the seconds that a micro-batch takes, forward and backward."""

LEAST_SHARE = 0.1
"""Of the mean layer's bytes: what a layer is taken to cost at least, before it is measured. Some have no parameters."""
LONGER = 0.01
"""How much longer than need be a step may become so that fewer layers move: they move once, and steps are many."""
ROUNDS = 4
NOISE = 0.1
SLOWEST, FASTEST = 0.05, 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """Who is seated, in the order that was given, and what each does."""

    seated: tuple[int, ...]
    """Members; their place here is their rank."""
    stages: tuple[Stage, ...]
    leaves: tuple[tuple[int, ...], ...]
    step_s: float
    """What a step takes by prediction; only relative while nothing is measured."""
    reason: str


def staged(
    shape: PipelineShape,
    members: Sequence[int],
    *,
    micro_batches: int,
    held: Mapping[int, tuple[int, int]],
    measured: Measured,
    leaving: Collection[int] = (),
) -> Staging:
    """held: by member, the layers first..stop-1 whose state it has. leaving: members without whom every layer is to be
    held as well: they get one micro-batch each, in the stage that is nearest to what they hold.

    Raises DoesNotFit.
    """
    if leaving:
        staying = [member for member in members if member not in leaving]
        base = staged(shape, staying, micro_batches=micro_batches, held=held, measured=measured)
        return _with_guests(base, [member for member in members if member in leaving], held)
    costs, speeds = costs_and_speeds(shape, measured, members)
    ranks = [Rank(speed=speeds[member], memory_bytes=shape.rank_bytes, holds=held.get(member)) for member in members]
    found = _partition(costs, tuple(ranks), stages=shape.stages, micro_batches=micro_batches, slack=LONGER)
    seats = sorted(index for stage in found.stages for index in stage.ranks)
    ranks_of = {index: rank for rank, index in enumerate(seats)}
    leaves = {index: run for stage in found.stages for index, run in zip(stage.ranks, stage.leaves, strict=True)}
    return Staging(
        seated=tuple(members[index] for index in seats),
        stages=tuple(
            Stage(first=stage.first, stop=stage.stop, ranks=tuple(ranks_of[index] for index in stage.ranks))
            for stage in found.stages
        ),
        leaves=tuple(leaves[index] for index in seats),
        step_s=found.step_s,
        reason=found.reason,
    )


_partition = functools.lru_cache(maxsize=16)(partition)
"""While something is waited for, the same is asked again at every event."""


def _with_guests(base: Staging, guests: Sequence[int], held: Mapping[int, tuple[int, int]]) -> Staging:
    stages, leaves, seated = list(base.stages), list(base.leaves), list(base.seated)
    for guest in guests:
        first, stop = held[guest]

        def shared(number: int, first: int = first, stop: int = stop) -> int:
            return min(stop, stages[number].stop) - max(first, stages[number].first)

        free = [number for number, stage in enumerate(stages) if any(len(leaves[rank]) > 1 for rank in stage.ranks)]
        if not free:
            raise DoesNotFit(f"member {guest} can't hand over its layers: every rank has one micro-batch only")
        number = max(free, key=lambda number: (shared(number), -number))
        giver = max(stages[number].ranks, key=lambda rank: (len(leaves[rank]), -rank))
        *kept, given = leaves[giver]
        leaves[giver] = tuple(kept)
        stages[number] = replace(stages[number], ranks=(*stages[number].ranks, len(leaves)))
        leaves.append((given,))
        seated.append(guest)
    return replace(base, seated=tuple(seated), stages=tuple(stages), leaves=tuple(leaves))


def costs_and_speeds(
    shape: PipelineShape, measured: Measured, members: Sequence[int]
) -> tuple[Costs, dict[int, float]]:
    """What each layer takes on a usual rank, and how fast each member is beside that."""
    speeds = dict.fromkeys({member for member, _ in measured} | set(members), 1.0)
    layers = range(len(shape.layer_bytes))
    known: dict[int, float] = {}
    for _ in range(ROUNDS):
        for layer in layers:
            times = [time_s * speeds[member] for (member, at), time_s in measured.items() if at == layer]
            if times:
                known[layer] = statistics.median(times)
        for member in speeds:
            ratios = [known[at] / time_s for (own, at), time_s in measured.items() if own == member and time_s > 0]
            if ratios:
                speeds[member] = min(max(statistics.median(ratios), SLOWEST), FASTEST)
    return Costs(layer_s=_filled(shape, known), layer_bytes=shape.layer_bytes), speeds


def _filled(shape: PipelineShape, known: Mapping[int, float]) -> tuple[float, ...]:
    """Layers that nobody has measured cost what their bytes do beside those that were."""
    least = LEAST_SHARE * sum(shape.layer_bytes) / len(shape.layer_bytes)
    weights = [max(size, least, 1.0) for size in shape.layer_bytes]
    weighed_s = sum(known.values()) / sum(weights[layer] for layer in known) if known else 1e-3 / max(weights)
    return tuple(
        max(known.get(layer, 0.0), 1e-9) if layer in known else weight * weighed_s
        for layer, weight in enumerate(weights)
    )


@dataclass(slots=True)
class Timings:
    """What ranks have measured so far."""

    known: dict[tuple[int, int], float] = field(default_factory=dict)
    changes: int = 0
    """How often something has become known, or other."""

    def take(self, member: int, layer_s: Sequence[tuple[int, float]]) -> None:
        """What differs by less than NOISE is the same: then nothing has to be planned for it."""
        for layer, time_s in layer_s:
            before = self.known.get((member, layer), 0.0)
            if time_s > 0 and abs(time_s - before) > NOISE * before:
                self.known[member, layer] = time_s
                self.changes += 1

    def forget(self, members: Sequence[int]) -> None:
        """Who has gone was as fast as it was: what it measured of layers stays, unless others have measured them."""
        for member, layer in [key for key in self.known if key[0] in set(members)]:
            if any(other != member and at == layer for other, at in self.known):
                del self.known[member, layer]


def step_s(plan: Plan, shape: PipelineShape, measured: Measured) -> float:
    """What a step of this plan takes by prediction, as `partition` predicts."""
    costs, speeds = costs_and_speeds(shape, measured, plan.members)
    usual, *_ = kinds_of([Rank(speed=speeds[member]) for member in plan.members], range(plan.size))
    stages = []
    for stage in plan.stages:
        stage_s = sum(costs.layer_s[stage.first : stage.stop])
        longest = max(len(plan.leaves[rank]) / speeds[plan.members[rank]] for rank in stage.ranks)
        stages.append((stage.first, longest * stage_s))
    return predicted_s(costs, usual.speed, stages)


def gain(plan: Plan, shape: PipelineShape, measured: Measured) -> float:
    """The share of a step that other stages would save. Raises DoesNotFit."""
    other = staged(shape, plan.members, micro_batches=plan.micro_batches, held=held_by(plan), measured=measured)
    return 1.0 - other.step_s / step_s(plan, shape, measured)


def held_by(plan: Plan | None) -> dict[int, tuple[int, int]]:
    """By member, the layers that it holds in this plan."""
    if plan is None:
        return {}
    return {plan.members[rank]: (stage.first, stage.stop) for stage in plan.stages for rank in stage.ranks}
