"""From members to plans: who owns which micro-batches.

One stage for now: every rank holds the whole model, and only micro-batches are dealt.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import TYPE_CHECKING

from snapshot.core.branches import Branch

from .plan import Kind, Place, Plan, Restore, Stage

if TYPE_CHECKING:
    from .staging import Staging


def even_runs(micro_batches: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Contiguous runs as even as possible, the longer ones first.

    Longer runs first keeps the boundaries of the common uneven cases (8 over 3: 3, 3, 2) near
    powers of two; an even power-of-two split gives each rank exactly one root of the tree.
    """
    assert 1 <= ranks <= micro_batches, (micro_batches, ranks)
    share, longer = divmod(micro_batches, ranks)
    runs: list[tuple[int, ...]] = []
    start = 0
    for rank in range(ranks):
        stop = start + share + (rank < longer)
        runs.append(tuple(range(start, stop)))
        start = stop
    return tuple(runs)


SMALL_GAIN = 0.05


def in_proportion(micro_batches: int, leaf_s: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Contiguous runs, at least one micro-batch each, with which the slowest rank is done as early as can be.

    leaf_s: what each rank takes for one. Even runs are taken where they cost hardly more: they exchange less.
    """
    assert 1 <= len(leaf_s) <= micro_batches and min(leaf_s) > 0, (micro_batches, leaf_s)
    counts = [1] * len(leaf_s)
    done_s = [(2 * each, rank) for rank, each in enumerate(leaf_s)]  # with one more
    heapify(done_s)
    for _ in range(micro_batches - len(leaf_s)):
        _, rank = done_s[0]
        counts[rank] += 1
        heapreplace(done_s, ((counts[rank] + 1) * leaf_s[rank], rank))
    stops = list(accumulate(counts))
    runs = tuple(tuple(range(stop - count, stop)) for stop, count in zip(stops, counts, strict=True))
    even = even_runs(micro_batches, len(leaf_s))
    return even if slowest_s(even, leaf_s) <= (1 + SMALL_GAIN) * slowest_s(runs, leaf_s) else runs


def slowest_s(leaves: Sequence[Sequence[int]], leaf_s: Sequence[float]) -> float:
    """How long the slowest rank computes."""
    return max(len(owned) * each for owned, each in zip(leaves, leaf_s, strict=True))


def deal_lost(plan: Plan, survivors: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The survivors' leaves with those of the lost ranks added, nothing taken from anybody (`lost_leaves`).

    In a pipeline somebody of each stage must be left.
    """
    ranks = [plan.ranks[member] for member in survivors]
    dealt: dict[int, tuple[int, ...]] = {}
    for team in (stage.ranks for stage in plan.stages) if plan.stages else (ranks,):
        left = {rank: plan.leaves[rank] for rank in sorted(set(team) & set(ranks))}
        dealt |= lost_leaves(left, plan.micro_batches)
    return tuple(dealt[rank] for rank in ranks)


def stages_left(plan: Plan, kept: Sequence[int]) -> tuple[Stage, ...]:
    """The stages with those ranks of theirs that are kept, ascending, as they are numbered afterwards."""
    numbers = {rank: number for number, rank in enumerate(kept)}
    return tuple(
        replace(stage, ranks=tuple(numbers[rank] for rank in stage.ranks if rank in numbers)) for stage in plan.stages
    )


def lost_leaves(kept: Mapping[int, tuple[int, ...]], micro_batches: int) -> dict[int, tuple[int, ...]]:
    """The leaves of ranks that hold the same layers, with those that nobody owns added and nothing taken from anybody.

    kept: by rank, the leaves of those that are left, at least one each, ascending. Each lost leaf goes to whoever has
    least so far; among equals to the owner of the nearest leaf, because neighbours complete subtrees and so exchange
    less; then to the lower rank.
    """
    assert kept and all(kept.values()), kept
    owned = dict(kept)
    owners = {leaf: rank for rank, leaves in owned.items() for leaf in leaves}
    nearby: list[int] = []  # ascending: the leaves of those who have least
    for index in sorted(set(range(micro_batches)) - owners.keys()):
        if not nearby:
            least = min(map(len, owned.values()))
            nearby = [leaf for leaf in sorted(owners) if len(owned[owners[leaf]]) == least]
        at = bisect(nearby, index)
        taker = min(
            (owners[leaf] for leaf in nearby[max(at - 1, 0) : at + 1]),
            key=lambda rank: (min(abs(index - own) for own in owned[rank]), rank),
        )
        for leaf in owned[taker]:
            nearby.pop(bisect(nearby, leaf) - 1)
        owned[taker] = tuple(sorted((*owned[taker], index)))
        owners[index] = taker
    return owned


def unplanned(plan: Plan, generation: int, survivors: Sequence[int], reason: str) -> Plan:
    """The generation after a loss: members seated in `plan` that live, owning what they owned and more."""
    living = set(survivors)
    kept = [member for member in plan.members if member in living]
    return Plan(
        generation=generation,
        base=plan.generation,
        kind="unplanned",
        places=tuple(plan.places[plan.ranks[member]] for member in kept),
        leaves=deal_lost(plan, kept),
        micro_batches=plan.micro_batches,
        joiners=(),
        reason=reason,
        branches=plan.branches,
        stages=stages_left(plan, [plan.ranks[member] for member in kept]),
        since=plan.since,
        sharded=plan.sharded,
        emptied=tuple(member for member in plan.emptied if member in living),
    )


def dealt_anew(
    *,
    generation: int,
    base: int,
    kind: Kind,
    places: Sequence[Place],
    joiners: Sequence[int],
    micro_batches: int,
    reason: str,
    branches: tuple[Branch, ...] = (Branch(number=0),),
    restore: Restore | None = None,
    leaf_s: Sequence[float] = (),
    staging: Staging | None = None,
    since: int = 0,
    sharded: bool = False,
    emptied: Sequence[int] = (),
) -> Plan:
    """An initial, planned or restored generation: all leaves dealt in contiguous runs, or as the staging says.

    leaf_s: by rank, what each takes for a micro-batch, to deal in proportion; evenly without it.
    """
    if staging is not None:
        leaves = staging.leaves
    else:
        leaves = in_proportion(micro_batches, leaf_s) if leaf_s else even_runs(micro_batches, len(places))
    return Plan(
        generation=generation,
        base=base,
        kind=kind,
        places=tuple(places),
        leaves=leaves,
        micro_batches=micro_batches,
        joiners=tuple(joiners),
        reason=reason,
        branches=branches,
        restore=restore,
        stages=() if staging is None else staging.stages,
        since=generation if kind == "restored" else since,
        sharded=sharded,
        emptied=tuple(emptied),
    )


def unbalanced(plan: Plan) -> bool:
    """Whether dealing anew would shorten the longest rank's step."""
    return plan.longest > -(-plan.micro_batches // plan.size)
