"""Which layers a plan gives to whom. Without stages every rank has all of them."""

from __future__ import annotations

from resilient.core.plan import Plan, Stage
from snapshot.core.digest import StatePart

from .truth import NOBODYS, State, digest_of, part_of


def layers_of(plan: Plan, member: int, count: int) -> range:
    """Those that this member holds, of so many."""
    stage = plan.stage_of(plan.rank_of(member))
    return range(count) if stage is None else range(stage.first, stage.stop)


def captured_by(plan: Plan, member: int, count: int) -> tuple[int, ...]:
    """The layers whose state this member captures: in a pipeline those of its stage are shared out among its ranks."""
    rank = plan.rank_of(member)
    stage = plan.stage_of(rank)
    if stage is None:
        return tuple(range(NOBODYS, count))
    layers = answered_for(stage)
    place, ways = stage.ranks.index(rank), len(stage.ranks)
    return tuple(layers[len(layers) * place // ways : len(layers) * (place + 1) // ways])


def answered_for(stage: Stage) -> range:
    """The layers of a stage; with the first goes what belongs to none."""
    return range(stage.first or NOBODYS, stage.stop)


def teams(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Members that hold the same layers."""
    if not plan.stages:
        return (plan.members,)
    return tuple(tuple(plan.members[rank] for rank in stage.ranks) for stage in plan.stages)


def is_staged(plan: Plan) -> bool:
    """Whether nobody holds everything."""
    return len(plan.stages) > 1


def all_stay(former: Plan, plan: Plan, count: int) -> bool:
    """Whether everybody who is in both holds the same layers."""
    both = former.ranks.keys() & plan.ranks.keys()
    return all(layers_of(former, member, count) == layers_of(plan, member, count) for member in both)


def told_at_the_end(plan: Plan | None, member: int, state: State, count: int) -> tuple[str, StatePart | None]:
    """What a rank returns with: the digest of its state, or the part that it answers for."""
    stage = None if plan is None or not is_staged(plan) else plan.stage_of(plan.rank_of(member))
    if stage is None:
        return digest_of(state, count), None
    return "", part_of(state, answered_for(stage), count)
