"""From layers, ranks and micro-batches to stages: who holds which layers, and who does which micro-batches.

Wanted, in this order:

1. The number of stages: what the user asked for, at most one per rank and per layer. If a limit of memory is known,
   the user's number is an upper bound: any smaller number that fits and seats everybody is tried too, and the fastest
   is taken, because fewer stages are often better balanced. Without a limit the number is kept: splitting is what was
   asked for.
2. The step is as short as can be: the slowest rank's computing, and what the pipeline's filling adds
   (`chain.predicted_s`).
3. The fewest bytes move between ranks.
4. The first in lexicographic order of cuts: the same input has the same answer.

What is exact, and what a bound:

- Ranks of one speed and memory: `step_s` is the least there is. `moved_bytes` is the least there is with that, if
  there are no more than `movement.EVERY` ways to cut; otherwise good, and not proven least.
- A few ranks of other speeds or memory (`Cutting.affordable`): speeds within SMALL_GAIN count as equal, and even runs
  of micro-batches are preferred where they cost no more than SMALL_GAIN, so `step_s` is at most
  1.001 (1 + SMALL_GAIN)^2 times the least. It may be more only where there are more ranks than micro-batches, too many
  to try all, and a rare kind is faster or larger than the common one. `moved_bytes` is not proven least.
- Many ranks of many speeds: see `mixed.py`. No bound is promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .chain import NANO, Costs, Kind, Rank, kinds_of, predicted_s
from .cuts import Cutting
from .mixed import mixed
from .movement import Movement, Seated
from .planner import SMALL_GAIN, even_runs, in_proportion, slowest_s

LISTED = 6
"""More stages than that are summed up in `reason`."""


class DoesNotFit(ValueError):
    """No split of the layers fits into the ranks' memory. The message says what is too large, and what would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    first: int
    stop: int
    """It is the layers first..stop-1."""
    ranks: tuple[int, ...]
    """Of those given, ascending."""
    leaves: tuple[tuple[int, ...], ...]
    """For each of its ranks the micro-batches that it does in this stage: a run, not empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Invariants: every layer is in one stage, in order; every rank is in one stage or unseated; every micro-batch is
    owned once in each stage."""

    stages: tuple[Stage, ...]
    unseated: tuple[int, ...]
    """Ranks for which there is no micro-batch, because each stage has as many ranks as micro-batches; ascending."""
    slowest_s: float
    """How long the rank that computes longest in a step does so."""
    step_s: float
    """That, or what is more: a later stage's time, and the filling before it (`chain.predicted_s`)."""
    moved_bytes: int
    """Of layers that a rank will hold and doesn't hold now, summed over ranks."""
    reason: str


def partition(costs: Costs, ranks: Sequence[Rank], *, stages: int, micro_batches: int, slack: float = 0.0) -> Partition:
    """The stages, and who does what in them.

    stages: at most so many. slack: how much longer than the least `step_s` may become so that fewer bytes move, as a
    fraction. Raises DoesNotFit if memory is too small for any split.
    """
    _check(costs, ranks, stages, micro_batches, slack)
    wanted = min(stages, len(ranks), costs.layers)
    among: Sequence[int] = range(len(ranks))
    kinds = kinds_of(ranks, among)
    if len(kinds) > 1 and len(ranks) > wanted * micro_batches:  # the fastest get the seats
        among = sorted(among, key=lambda index: (-ranks[index].speed, index))[: wanted * micro_batches]
        kinds = kinds_of(ranks, among)
    fewest = min(wanted, -(-len(ranks) // micro_batches))
    limited = any(rank.memory_bytes is not None for rank in ranks)
    counts = range(fewest if limited else wanted, wanted + 1)
    found = [
        _written(costs, ranks, kinds[0].speed, seated, micro_batches)
        for seated in _seated(costs, ranks, kinds, counts, micro_batches, slack)
    ]
    if not found:
        raise DoesNotFit(_too_small(costs, ranks, wanted))
    return min(found, key=lambda each: (each.step_s, each.moved_bytes))


def _seated(
    costs: Costs, ranks: Sequence[Rank], kinds: tuple[Kind, ...], counts: range, micro_batches: int, slack: float
) -> list[Seated]:
    cutting = Cutting(costs, kinds, micro_batches, counts[-1])
    if not cutting.affordable:
        return list(mixed(costs, ranks, kinds, counts, micro_batches, slack))
    least_ns = cutting.least_ns(counts)
    if least_ns is None:
        return []
    return [Movement(costs, ranks, kinds).least(cutting, int(least_ns * (1 + slack)), counts)]


def _written(costs: Costs, ranks: Sequence[Rank], usual_speed: float, seated: Seated, micro_batches: int) -> Partition:
    stages = []
    slowest: list[float] = []
    for first, stop, members in zip(seated.cut, seated.cut[1:], seated.ranks, strict=False):
        stage_s = sum(costs.layer_ns[first:stop]) / NANO
        leaf_s = [stage_s / ranks[index].speed for index in members]
        leaves = _runs(micro_batches, leaf_s)
        stages.append(Stage(first=first, stop=stop, ranks=members, leaves=leaves))
        slowest.append(slowest_s(leaves, leaf_s))
    seats = {index for stage in stages for index in stage.ranks}
    found = Partition(
        stages=tuple(stages),
        unseated=tuple(index for index in range(len(ranks)) if index not in seats),
        slowest_s=max(slowest),
        step_s=predicted_s(costs, usual_speed, zip(seated.cut, slowest, strict=False)),
        moved_bytes=seated.moved_bytes,
        reason="",
    )
    return replace(found, reason=_in_words(found, len(ranks)))


def _runs(micro_batches: int, leaf_s: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """What `in_proportion` answers, without its search where even runs are known to be preferred."""
    if max(leaf_s) <= (1 + SMALL_GAIN) * min(leaf_s):
        return even_runs(micro_batches, len(leaf_s))
    return in_proportion(micro_batches, leaf_s)


# In words


def _in_words(found: Partition, ranks: int) -> str:
    text = f"{_many(ranks, 'rank')} over {_many(len(found.stages), 'stage')}: "
    if len(found.stages) <= LISTED:
        text += ", ".join(f"{_layers(stage)} on {_many(len(stage.ranks), 'rank')}" for stage in found.stages)
    else:
        text += f"{_span([stage.stop - stage.first for stage in found.stages], 'layer')} "
        text += f"on {_span([len(stage.ranks) for stage in found.stages], 'rank')} each"
    if found.unseated:
        text += f"; {_many(len(found.unseated), 'rank')} unseated, for want of micro-batches"
    moved = f"{_size(found.moved_bytes)} of layers move" if found.moved_bytes else "no layer moves"
    return f"{text}; the slowest stage takes {found.slowest_s:.3g} s of a step of {found.step_s:.3g} s; {moved}"


def _layers(stage: Stage) -> str:
    return f"layer {stage.first}" if stage.stop == stage.first + 1 else f"layers {stage.first}-{stage.stop - 1}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _span(counts: Sequence[int], what: str) -> str:
    low, high = min(counts), max(counts)
    return _many(low, what) if low == high else f"{low} to {high} {what}s"


def _size(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.4g} TB"


def _too_small(costs: Costs, ranks: Sequence[Rank], wanted: int) -> str:
    limits = [rank.memory_bytes for rank in ranks if rank.memory_bytes is not None]
    largest, smallest = max(costs.layer_bytes), min(costs.layer_bytes)
    if largest > max(limits) and len(limits) == len(ranks):
        layer = costs.layer_bytes.index(largest)
        return (
            f"layer {layer} has {_size(largest)}, and no rank has more than {_size(max(limits))} for its layers: give "
            "ranks more memory, or make two layers of it"
        )
    if min(limits) < smallest:
        rank = next(index for index, each in enumerate(ranks) if each.memory_bytes == min(limits))
        return (
            f"rank {rank} has {_size(min(limits))} for its layers, and the smallest layer has {_size(smallest)}: give "
            "it more memory, or leave it out"
        )
    return (
        f"{_many(costs.layers, 'layer')} of {_size(sum(costs.layer_bytes))} don't fit into {_many(wanted, 'stage')} on "
        f"{_many(len(ranks), 'rank')}, of which the smallest has {_size(min(limits))} for its layers: allow more "
        "stages, add ranks, or give them more memory"
    )


def _check(costs: Costs, ranks: Sequence[Rank], stages: int, micro_batches: int, slack: float) -> None:
    for name, value in (("stages", stages), ("micro_batches", micro_batches), ("ranks", len(ranks))):
        if value < 1:
            raise ValueError(f"{name}={value}: there must be one at least")
    if not 0 <= slack <= 1:
        raise ValueError(f"slack={slack}: give a fraction between 0 and 1; 0.05 allows steps 5 % longer")
    for index, rank in enumerate(ranks):
        if rank.holds is not None and rank.holds[1] > costs.layers:
            raise ValueError(f"holds={rank.holds} of rank {index}: there are {costs.layers} layers; give these")
    slowest = min(rank.speed for rank in ranks)
    if micro_batches * sum(costs.layer_ns) / slowest**2 > 1 << 58:
        raise ValueError(
            f"layer_s: {micro_batches} micro-batches would take {micro_batches * sum(costs.layer_s) / slowest:.3g} s "
            "on the slowest rank, longer than can be planned; check that layer_s is in seconds"
        )
