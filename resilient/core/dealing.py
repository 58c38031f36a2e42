"""The plan of a generation, once it is decided that there shall be one: who has a seat, and what is dealt to whom."""

from __future__ import annotations

from collections.abc import Collection

from snapshot.core.branches import Lineage

from . import planner, speeds
from .events import PipelineShape
from .partition import DoesNotFit
from .plan import Plan, Restore, first_branch
from .situation import Decision, Make, NeedNodes, Situation, Stay
from .staging import Staging, held_by, staged
from .standing import Member


def too_few(now: Situation, ready: int) -> NeedNodes | Stay | None:
    """Why these can't begin yet, if they can't."""
    if ready < now.limits.min_workers:
        return NeedNodes(reason=f"{ready} of at least {now.limits.min_workers} workers are ready")
    starting = bool(now.membership.everybody.values("starting"))
    # Once it has run, who comes later joins for next to nothing; a standstill costs everything.
    patience_s = now.limits.start_together_s if now.formed is None else now.limits.detection_s
    if ready < now.limits.max_workers and starting and now.waited_s < patience_s:
        return Stay(reason="waiting for workers that are starting")
    return None


def dealt(
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
            return dealt(now, members, current, reason, leaving=left_out)
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


def restored(now: Situation, restore: Restore, lineage: Lineage, reason: str) -> Decision:
    """A generation that begins from a snapshot, as soon as there are enough ranks: fresh ones, and those that
    have dropped their state for a restored generation which then failed."""
    trying = now.current.members if now.current is not None and now.current.kind == "restored" else ()
    again = [member for member in now.membership.alive() if member.number in trying and member.ready is not None]
    ready = [*again, *now.membership.ready_unseated(trying)]
    return too_few(now, len(ready)) or _restored(now, ready[: now.limits.max_workers], restore, lineage, reason)


def rolled_back(now: Situation, restore: Restore, lineage: Lineage, reason: str) -> Decision:
    """The same for the ranks that are seated, who drop the state they have, and others if those are too few, or a
    pipeline does not fit into their memory."""
    assert now.current is not None
    seated = [now.membership.members[number] for number in now.current.members]
    seated = [member for member in seated if not member.gone and member.ready is not None]
    more = [*seated, *now.membership.ready_unseated(now.current.ranks)][: now.limits.max_workers]
    members = seated if len(seated) >= now.limits.min_workers else more
    if len(members) < now.limits.min_workers and (short := too_few(now, len(members))) is not None:
        return short
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
