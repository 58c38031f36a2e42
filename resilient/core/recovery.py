"""What the next generation should be, if there should be one: the recovery ladder as a pure function.

1. A link broke and everybody lives: form again, go on.
2. Ranks are lost, others hold the same state: deal the lost micro-batches to those.
3. Nobody seated is left: the state is gone, unless there is a snapshot of it.
A joiner, whoever is to leave, or uneven dealing after a loss asks for a planned change, and only while all is well.
"""

from __future__ import annotations

from collections.abc import Collection

from . import draining, planner
from .dealing import dealt, too_few
from .plan import Plan
from .situation import Decision, Lost, Make, NeedNodes, Situation, Stay, broken, finished, groups, needs_base


def decide(now: Situation) -> Decision:
    if now.current is not None and now.current.kind == "restored" and now.current is not now.formed:
        unfinished = now.formed is None or now.formed.generation <= now.current.base
        if unfinished:
            return _still_restoring(now, now.current)
    if now.formed is None:
        return _initial(now)
    assert now.current is not None
    if now.current.generation != now.formed.generation and now.current.base < now.formed.generation:
        return _after_loss(now, now.formed, f"generation {now.formed.generation} had formed after all")
    seated = now.membership.tally(now.current)
    if seated.values("gone"):
        return _after_loss(now, now.formed, f"lost rank {_ranks(now.current, seated.numbers('gone'))}")
    base = now.membership.tally(now.formed)
    if base.values("gone") and needs_base(now.membership, now.formed, now.current):
        return _after_loss(now, now.formed, f"lost rank {_ranks(now.formed, base.numbers('gone'))}")
    if now.stands_still:
        return _after_loss(now, now.formed, "all ranks wait for each other, and nothing comes")
    if broken(now.membership, now.formed, now.current):
        if now.broken_for_s < now.limits.settle_s:
            return Stay(reason="a link broke; waiting to learn whether somebody died")
        seen_by = _ranks(now.current, seated.numbers("broken", groups(now.current)))
        if not seen_by:
            seen_by = _ranks(now.formed, base.numbers("broken", {now.formed.generation}))
        return _after_loss(now, now.formed, f"a link broke, seen by rank {seen_by}")
    if now.current.generation != now.formed.generation:
        return Stay(reason=f"generation {now.current.generation} is forming")
    return _improve(now, now.current)


def _still_restoring(now: Situation, current: Plan) -> Decision:
    if gone := now.membership.tally(current).numbers("gone"):
        return Lost(reason=f"lost rank {_ranks(current, gone)} while generation {current.generation} was restored")
    if now.broken_for_s >= now.limits.settle_s:
        return Lost(reason=f"generation {current.generation} could not be restored")
    return Stay(reason=f"generation {current.generation} is being restored")


def _initial(now: Situation) -> Decision:
    if now.current is not None:
        gone = now.membership.tally(now.current).count("gone")
        if not gone and now.broken_for_s < now.limits.settle_s:
            return Stay(reason=f"generation {now.current.generation} is forming")
        if now.inherited and gone == now.current.size:
            # It may have formed long ago: beginning anew could throw away any amount of work.
            return Lost(reason=_nobody_left("every rank died while no controller ran", now.current))
    if (reason := too_few(now, now.membership.everybody.count("ready"))) is not None:
        return reason
    return dealt(now, now.membership.ready_unseated(())[: now.limits.max_workers], None, "the run begins")


def _after_loss(now: Situation, formed: Plan, reason: str) -> Decision:
    seated = now.membership.tally(formed)
    gone = seated.numbers("gone")
    left = formed.size - len(gone)
    if not left:
        return Lost(reason=_nobody_left(reason, formed))
    left += now.membership.count_ready_outside(formed)
    if left < now.limits.min_workers and not finished(seated):
        return NeedNodes(reason=f"{reason}; {left} of at least {now.limits.min_workers} workers are left")
    if gone and formed.sharded:
        return Lost(reason=f"{reason}; with it went optimizer state that no other rank has")
    survivors = [member for member in formed.members if member not in gone]
    for number, stage in enumerate(formed.stages):
        if all(formed.members[rank] in gone for rank in stage.ranks):
            layers = f"{stage.first}..{stage.stop - 1}"
            return Lost(reason=f"{reason}; no rank of stage {number} is left, and only they held layers {layers}")
    return Make(plan=planner.unplanned(formed, now.newest + 1, survivors, reason))


def _improve(now: Situation, current: Plan) -> Decision:
    if finished(now.membership.tally(current)):
        return Stay(reason="the loop has ended")
    if current.stages and now.membership.first_ready() is None:
        return Stay(reason="waiting to hear what there is to know of the pipeline")
    if now.membership.tally(current).values("leaving"):
        return _drain(now, current)
    room = min(now.limits.max_workers, current.seats) - current.size
    if room > 0 and now.membership.count_ready_outside(current):
        joiners = now.membership.ready_unseated(current.ranks)[:room]
        nodes = ", ".join(sorted({member.node[:8] for member in joiners}))
        return dealt(now, joiners, current, f"{len(joiners)} joined (node {nodes})")
    if current.stages:
        return _restage(now, current)
    if current.kind == "unplanned" and planner.unbalanced(current):
        return dealt(now, [], current, "micro-batches dealt evenly again")
    if now.uneven:
        return dealt(now, [], current, "micro-batches dealt in proportion to the ranks' speed")
    return Stay(reason="all is well")


def _restage(now: Situation, current: Plan) -> Decision:
    """Other stages, if they are worth it: at once after a loss, else when they have been for a while."""
    if now.uneven:
        return dealt(now, [], current, "layers and micro-batches dealt anew, by what they were measured to take")
    if current.kind == "unplanned" and now.gain > planner.SMALL_GAIN:
        return dealt(now, [], current, "layers and micro-batches dealt anew after a loss")
    return Stay(reason="all is well")


def _drain(now: Situation, current: Plan) -> Decision:
    limits = now.limits
    choice = draining.choose(
        now.membership,
        current,
        least=limits.min_workers,
        most=limits.max_workers,
        wanted=limits.max_workers + limits.spares,
    )
    if choice.short:
        return Stay(reason=choice.short, stuck=not choice.waits)
    if choice.waits and now.may_wait_s > 0:
        return Stay(reason="waiting for workers that take the place of those that leave")
    leave = {member.number for member in choice.leave}
    sole = any(leave >= {current.members[rank] for rank in stage.ranks} for stage in current.stages)
    if sole:
        reason = "those that leave hand over their layers"
        return dealt(now, list(choice.join), current, reason, leaving=leave)
    if current.sharded and not leave <= set(current.emptied):
        return dealt(now, [], current, "those that leave hand over their optimizer state", emptied=leave)
    return dealt(now, list(choice.join), current, choice.reason, [member.number for member in choice.stay])


def _nobody_left(reason: str, plan: Plan) -> str:
    return f"{reason}; no rank of generation {plan.generation} is left, and only they held the state"


def _ranks(plan: Plan, members: Collection[int]) -> str:
    return ", ".join(f"{rank} (node {plan.places[rank].node[:8]})" for rank in sorted(map(plan.rank_of, members)))
