"""What the next generation should be, if there should be one: the recovery ladder as a pure function.

1. A link broke and everybody lives: form again, go on.
2. Ranks are lost, others hold the same state: deal the lost micro-batches to those.
3. Nobody seated is left: the state is gone, unless there is a snapshot of it.
A joiner, or uneven dealing after a loss, asks for a planned change, and only while all is well.
"""

from __future__ import annotations

from dataclasses import dataclass

from snapshot.core.branches import Lineage

from . import planner
from .membership import Member, Membership
from .plan import Plan, Restore, first_branch


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user allows, and the few times that everything else is derived from."""

    min_workers: int
    max_workers: int
    spares: int = 0
    snapshots: bool = False
    """Whether keepers hold any."""
    checkpoints: bool = False
    """Whether keepers write some of them to storage."""
    wait_for_nodes_s: float = 600.0
    """How long the run may stand still below `min_workers`."""
    detection_s: float = 2.0

    @property
    def settle_s(self) -> float:
        """How long a broken link may take to turn out to be a death."""
        return self.detection_s / 4

    @property
    def resend_s(self) -> float:
        return self.detection_s / 4

    def lost_limit_s(self, some_are_absent: bool) -> float:
        """How long nothing may be found to go on from; a keeper that is being replaced may still have it."""
        return (15 if some_are_absent else 1) * self.detection_s

    @property
    def start_together_s(self) -> float:
        """How long ranks that are ready wait for others that are still starting."""
        return 15 * self.detection_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedNodes:
    """Fewer ranks than the user's minimum can be had now."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """No live rank holds the state."""

    reason: str


Decision = Make | Stay | NeedNodes | Lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that the decision depends on."""

    limits: Limits
    membership: Membership
    formed: Plan | None
    """The last generation known to have formed: its members hold the state."""
    current: Plan | None
    """The newest generation on record, formed or not."""
    newest: int
    """The highest generation number ever used."""
    inherited: bool
    """Whether no generation is newer than those that an earlier controller has made."""
    broken_for_s: float
    """For how long a link of the current generation has been reported broken."""
    waited_s: float
    """For how long enough ranks to begin have been ready."""


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
    gone = [member for member in now.current.members if not now.membership.is_alive(member)]
    if gone:
        return _after_loss(now, now.formed, f"lost rank {_ranks(now.current, gone)}")
    if seen_by := broken(now.membership, now.current):
        if now.broken_for_s < now.limits.settle_s:
            return Stay(reason="a link broke; waiting to learn whether somebody died")
        return _after_loss(now, now.formed, f"a link broke, seen by rank {_ranks(now.current, seen_by)}")
    if now.current.generation != now.formed.generation:
        return Stay(reason=f"generation {now.current.generation} is forming")
    return _improve(now, now.current)


def _still_restoring(now: Situation, current: Plan) -> Decision:
    gone = [member for member in current.members if not now.membership.is_alive(member)]
    if gone:
        return Lost(reason=f"lost rank {_ranks(current, gone)} while generation {current.generation} was restored")
    if now.broken_for_s >= now.limits.settle_s:
        return Lost(reason=f"generation {current.generation} could not be restored")
    return Stay(reason=f"generation {current.generation} is being restored")


def restored(now: Situation, restore: Restore, lineage: Lineage, reason: str) -> Decision:
    """A generation that begins from a snapshot, as soon as there are enough ranks: fresh ones, and those that
    have dropped their state for a restored generation which then failed."""
    trying = now.current.members if now.current is not None and now.current.kind == "restored" else ()
    again = [member for member in now.membership.alive() if member.number in trying and member.ready is not None]
    ready = [*again, *now.membership.ready_unseated(trying)]
    return _too_few(now, ready) or _restored(now, ready[: now.limits.max_workers], restore, lineage, reason)


def rolled_back(now: Situation, restore: Restore, lineage: Lineage, reason: str) -> Decision:
    """The same for the ranks that are seated: they drop the state they have."""
    assert now.current is not None
    members = [now.membership.members[number] for number in now.current.members]
    members = [member for member in members if not member.gone and member.ready is not None]
    if len(members) < now.limits.min_workers:
        return restored(now, restore, lineage, reason)
    return _restored(now, members, restore, lineage, reason)


def _restored(now: Situation, members: list[Member], restore: Restore, lineage: Lineage, reason: str) -> Make:
    return Make(
        plan=planner.dealt_anew(
            generation=now.newest + 1,
            base=now.formed.generation if now.formed else 0,
            kind="restored",
            places=[member.place for member in members],
            joiners=[],
            micro_batches=_micro_batches(members),
            reason=reason,
            branches=lineage.branches,
            restore=restore,
        )
    )


def _initial(now: Situation) -> Decision:
    if now.current is not None:
        gone = [member for member in now.current.members if not now.membership.is_alive(member)]
        if not gone and now.broken_for_s < now.limits.settle_s:
            return Stay(reason=f"generation {now.current.generation} is forming")
        if now.inherited and len(gone) == now.current.size:
            # It may have formed long ago: beginning anew could throw away any amount of work.
            return Lost(reason=_nobody_left("every rank died while no controller ran", now.current))
    ready = now.membership.ready_unseated(())
    return _too_few(now, ready) or _dealt(now, ready[: now.limits.max_workers], None, "the run begins")


def _too_few(now: Situation, ready: list[Member]) -> NeedNodes | Stay | None:
    """Why these can't begin yet, if they can't."""
    if len(ready) < now.limits.min_workers:
        return NeedNodes(reason=f"{len(ready)} of at least {now.limits.min_workers} workers are ready")
    starting = any(member.ready is None for member in now.membership.alive())
    if len(ready) < now.limits.max_workers and starting and now.waited_s < now.limits.start_together_s:
        return Stay(reason="waiting for workers that are starting")
    return None


def _after_loss(now: Situation, formed: Plan, reason: str) -> Decision:
    survivors = [member for member in formed.members if now.membership.is_alive(member)]
    if not survivors:
        return Lost(reason=_nobody_left(reason, formed))
    coming = now.membership.ready_unseated(formed.members)
    ending = any(finished(now.membership.members[member]) for member in survivors)
    if len(survivors) + len(coming) < now.limits.min_workers and not ending:
        return NeedNodes(
            reason=f"{reason}; {len(survivors) + len(coming)} of at least {now.limits.min_workers} workers are left"
        )
    return Make(plan=planner.unplanned(formed, now.newest + 1, survivors, reason))


def _improve(now: Situation, current: Plan) -> Decision:
    if any(finished(now.membership.members[member]) for member in current.members):
        return Stay(reason="the loop has ended")
    room = min(now.limits.max_workers, current.micro_batches) - current.size
    joiners = now.membership.ready_unseated(current.members)[: max(room, 0)]
    if joiners:
        nodes = ", ".join(sorted({member.node[:8] for member in joiners}))
        return _dealt(now, joiners, current, f"{len(joiners)} joined (node {nodes})")
    if planner.unbalanced(current):
        return _dealt(now, [], current, "micro-batches dealt evenly again")
    return Stay(reason="all is well")


def _dealt(now: Situation, members: list[Member], current: Plan | None, reason: str) -> Decision:
    seated = current.places if current else ()
    numbers = [member.number for member in members]
    micro_batches = current.micro_batches if current else _micro_batches(members)
    return Make(
        plan=planner.dealt_anew(
            generation=now.newest + 1,
            base=current.generation if current else 0,
            kind="planned" if current else "initial",
            places=[*seated, *(member.place for member in members)],
            joiners=numbers if current else numbers[1:],
            micro_batches=micro_batches,
            reason=reason,
            branches=current.branches if current else first_branch().branches,
        )
    )


def _micro_batches(members: list[Member]) -> int:
    first = members[0].ready
    assert first is not None
    return first.micro_batches


def broken(membership: Membership, current: Plan) -> list[int]:
    """The living members of the current generation that say that their group's link broke.

    Beside the group of the current generation it may be that of its base, as long as members have not
    switched: a planned generation is reached only over an exchange of its base.
    """
    groups = (current.generation, current.base) if current.kind == "planned" else (current.generation,)
    return [
        number
        for number in current.members
        if membership.is_alive(number)
        and (report := membership.members[number].report) is not None
        and report.broken == report.generation
        and report.broken in groups
    ]


def _nobody_left(reason: str, plan: Plan) -> str:
    return f"{reason}; no rank of generation {plan.generation} is left, and only they held the state"


def finished(member: Member) -> bool:
    return member.digest is not None or (member.report is not None and member.report.finished)


def _ranks(plan: Plan, members: list[int]) -> str:
    return ", ".join(
        f"{plan.rank_of(member)} (node {plan.places[plan.rank_of(member)].node[:8]})" for member in members
    )
