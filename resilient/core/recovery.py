"""What the next generation should be, if there should be one: the recovery ladder as a pure function.

1. A link broke and everybody lives: form again, go on.
2. Ranks are lost, others hold the same state: deal the lost micro-batches to those.
3. Nobody seated is left: the state is gone, unless there is a snapshot of it.
A joiner, whoever is to leave, or uneven dealing after a loss asks for a planned change, and only while all is well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from snapshot.core.branches import Lineage

from . import draining, planner, speeds
from .events import PipelineShape
from .membership import Membership
from .partition import DoesNotFit
from .plan import Plan, Restore, first_branch
from .staging import Measured, Staging, held_by, staged
from .standing import Member, Tally


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
    max_failures: int | None = None
    """Ranks and nodes that may be lost within an hour."""
    evict_stragglers: bool = False

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
    stuck: bool = False
    """Somebody is to leave, and can't."""


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
    may_wait_s: float = 0.0
    """How long those who are to leave may still wait for others to take their place."""
    leaf_s: Mapping[int, float] = field(default_factory=dict)
    """By member that has measured it, what it takes for a micro-batch."""
    layer_s: Measured = field(default_factory=dict)
    """In a pipeline, by (member, layer), what a micro-batch takes."""
    gain: float = 0.0
    """In a pipeline after a loss, the share of a step that other stages would save, as it was found last: to look for
    them takes long."""
    uneven: bool = False
    """Whether dealing in proportion to that would have been worth it for long enough."""


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
    if broken(now.membership, now.formed, now.current):
        if now.broken_for_s < now.limits.settle_s:
            return Stay(reason="a link broke; waiting to learn whether somebody died")
        seen_by = _ranks(now.current, seated.numbers("broken", _groups(now.current)))
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


def restored(now: Situation, restore: Restore, lineage: Lineage, reason: str) -> Decision:
    """A generation that begins from a snapshot, as soon as there are enough ranks: fresh ones, and those that
    have dropped their state for a restored generation which then failed."""
    trying = now.current.members if now.current is not None and now.current.kind == "restored" else ()
    again = [member for member in now.membership.alive() if member.number in trying and member.ready is not None]
    ready = [*again, *now.membership.ready_unseated(trying)]
    return _too_few(now, len(ready)) or _restored(now, ready[: now.limits.max_workers], restore, lineage, reason)


def rolled_back(now: Situation, restore: Restore, lineage: Lineage, reason: str) -> Decision:
    """The same for the ranks that are seated, who drop the state they have, and others if those are too few, or a
    pipeline does not fit into their memory."""
    assert now.current is not None
    seated = [now.membership.members[number] for number in now.current.members]
    seated = [member for member in seated if not member.gone and member.ready is not None]
    more = [*seated, *now.membership.ready_unseated(now.current.ranks)][: now.limits.max_workers]
    members = seated if len(seated) >= now.limits.min_workers else more
    if (too_few := _too_few(now, len(members))) is not None and len(members) < now.limits.min_workers:
        return too_few
    decision = _restored(now, members, restore, lineage, reason)
    if isinstance(decision, NeedNodes) and len(more) > len(members):
        decision = _restored(now, more, restore, lineage, reason)
    return decision


def _restored(now: Situation, members: list[Member], restore: Restore, lineage: Lineage, reason: str) -> Decision:
    try:
        staging = _staging(now, members)
    except DoesNotFit as error:
        return NeedNodes(reason=str(error))
    if staging is not None:
        members = [now.membership.members[number] for number in staging.seated]
        reason = f"{reason}; {staging.reason}"
    return Make(
        plan=planner.dealt_anew(
            generation=now.newest + 1,
            base=now.formed.generation if now.formed else 0,
            kind="restored",
            places=[member.place for member in members],
            joiners=[],
            micro_batches=_micro_batches(now),
            reason=reason,
            branches=lineage.branches,
            restore=restore,
            staging=staging,
            sharded=_sharded(now),
        )
    )


def _initial(now: Situation) -> Decision:
    if now.current is not None:
        gone = now.membership.tally(now.current).count("gone")
        if not gone and now.broken_for_s < now.limits.settle_s:
            return Stay(reason=f"generation {now.current.generation} is forming")
        if now.inherited and gone == now.current.size:
            # It may have formed long ago: beginning anew could throw away any amount of work.
            return Lost(reason=_nobody_left("every rank died while no controller ran", now.current))
    if (reason := _too_few(now, now.membership.everybody.count("ready"))) is not None:
        return reason
    return _dealt(now, now.membership.ready_unseated(())[: now.limits.max_workers], None, "the run begins")


def _too_few(now: Situation, ready: int) -> NeedNodes | Stay | None:
    """Why these can't begin yet, if they can't."""
    if ready < now.limits.min_workers:
        return NeedNodes(reason=f"{ready} of at least {now.limits.min_workers} workers are ready")
    starting = bool(now.membership.everybody.values("starting"))
    if ready < now.limits.max_workers and starting and now.waited_s < now.limits.start_together_s:
        return Stay(reason="waiting for workers that are starting")
    return None


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
        return _dealt(now, joiners, current, f"{len(joiners)} joined (node {nodes})")
    if current.stages:
        return _restage(now, current)
    if current.kind == "unplanned" and planner.unbalanced(current):
        return _dealt(now, [], current, "micro-batches dealt evenly again")
    if now.uneven:
        return _dealt(now, [], current, "micro-batches dealt in proportion to the ranks' speed")
    return Stay(reason="all is well")


def _restage(now: Situation, current: Plan) -> Decision:
    """Other stages, if they are worth it: at once after a loss, else when they have been for a while."""
    if now.uneven:
        return _dealt(now, [], current, "layers and micro-batches dealt anew, by what they were measured to take")
    if current.kind == "unplanned" and now.gain > planner.SMALL_GAIN:
        return _dealt(now, [], current, "layers and micro-batches dealt anew after a loss")
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
        return _dealt(now, list(choice.join), current, reason, leaving=leave)
    if current.sharded and not leave <= set(current.emptied):
        return _dealt(now, [], current, "those that leave hand over their optimizer state", emptied=leave)
    return _dealt(now, list(choice.join), current, choice.reason, [member.number for member in choice.stay])


def _dealt(
    now: Situation,
    members: list[Member],
    current: Plan | None,
    reason: str,
    staying: list[int] | None = None,
    leaving: Collection[int] = (),
    emptied: Collection[int] = (),
) -> Decision:
    """staying: members of the current generation; all of them if that is None. leaving: those who stay only until
    others hold their layers. emptied: only until others hold their optimizer state."""
    seated = current.places if current else ()
    if staying is not None:
        seated = tuple(place for place in seated if place.member in staying)
    places = [*seated, *(member.place for member in members)]
    try:
        staging = _staging(now, [now.membership.members[place.member] for place in places], leaving)
    except DoesNotFit as error:
        return (
            NeedNodes(reason=str(error))
            if current is None
            else Stay(reason=str(error), stuck=staying is not None or bool(leaving))
        )
    if staging is not None:
        left_out = set(current.members).difference(staging.seated, current.emptied) if current is not None else ()
        if left_out and current is not None and current.sharded:  # nobody else would have their optimizer state
            return _dealt(now, members, current, reason, leaving=left_out)
        by_member = {place.member: place for place in places}
        places = [by_member[member] for member in staging.seated]
        reason = f"{reason}; {staging.reason}"
    numbers = [member.number for member in members if staging is None or member.number in staging.seated]
    return Make(
        plan=planner.dealt_anew(
            generation=now.newest + 1,
            base=current.generation if current else 0,
            kind="planned" if current else "initial",
            places=places,
            joiners=numbers if current else [place.member for place in places[1:]],
            micro_batches=current.micro_batches if current else _micro_batches(now),
            reason=reason,
            branches=current.branches if current else first_branch().branches,
            leaf_s=speeds.filled([place.member for place in places], now.leaf_s) if current and now.leaf_s else (),
            staging=staging,
            since=current.since if current else 0,
            sharded=_sharded(now),
            emptied=sorted({*leaving, *emptied}),
        )
    )


def _staging(now: Situation, members: list[Member], leaving: Collection[int] = ()) -> Staging | None:
    """The stages of a pipeline for these, who are at least one; None where every rank holds the whole model."""
    shape = _shape(now)
    if shape is None:
        return None
    return staged(
        shape,
        [member.number for member in members],
        micro_batches=_micro_batches(now),
        held=held_by(now.formed),
        measured=now.layer_s,
        leaving=leaving,
    )


def _shape(now: Situation) -> PipelineShape | None:
    """As anybody has told it: of those who are seated, a controller that came back may not have heard yet."""
    first = now.membership.first_ready()
    return None if first is None else first.pipeline


def _sharded(now: Situation) -> bool:
    shape = _shape(now)
    return shape is not None and shape.sharded


def _micro_batches(now: Situation) -> int:
    first = now.membership.first_ready()
    assert first is not None
    return first.micro_batches


def broken(membership: Membership, formed: Plan | None, current: Plan) -> bool:
    """Whether living members of the current generation say that their group's link broke."""
    if not _groups(current).isdisjoint(membership.tally(current).values("broken")):
        return True
    if formed is None or formed.generation not in membership.tally(formed).values("broken"):
        return False
    return needs_base(membership, formed, current)


def needs_base(membership: Membership, formed: Plan, current: Plan) -> bool:
    """Whether the current generation leaves members of its base out, and may not be reached without them: as long as
    not all have switched to it, over an exchange of the base.
    """
    if current is formed or current.kind != "planned" or formed.ranks.keys() <= current.ranks.keys():
        return False
    reports = (membership.members[number].report for number in current.members if number in formed.ranks)
    return any(report is None or report.generation < current.generation for report in reports)


def _groups(current: Plan) -> set[int]:
    """Whose links matter. Beside the group of the current generation it may be that of its base, as long as members
    have not switched: a planned generation is reached only over an exchange of its base.
    """
    return {current.generation, current.base} if current.kind == "planned" else {current.generation}


def _nobody_left(reason: str, plan: Plan) -> str:
    return f"{reason}; no rank of generation {plan.generation} is left, and only they held the state"


def finished(seated: Tally) -> bool:
    """Whether any of them is through with the loop."""
    return bool(seated.values("left") or seated.values("digest"))


def _ranks(plan: Plan, members: Collection[int]) -> str:
    return ", ".join(f"{rank} (node {plan.places[rank].node[:8]})" for rank in sorted(map(plan.rank_of, members)))
