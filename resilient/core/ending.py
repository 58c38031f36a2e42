"""Whether the run is over: every rank has returned, with the same state or not, or some left the loop too early."""

from __future__ import annotations

from dataclasses import dataclass

from snapshot.core.digest import put_together

from .difference import odd_ones
from .instructions import End
from .lane import NOBODYS
from .membership import Membership
from .plan import Plan
from .standing import Member, Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class EndsDiffer:
    """All have returned, with different states. suspects: members that stand against a majority."""

    reason: str
    suspects: tuple[int, ...] = ()


def end_of(membership: Membership, plan: Plan, current: Plan) -> End | EndsDiffer | None:
    """plan: whose members must all return. current: by which a message calls them."""
    seated = membership.tally(plan)
    if not seated.values("left") and not seated.values("digest"):
        return None
    if _somebody_is_left_alone(seated):
        return End(outcome="failed", reason=_left_alone(membership, plan, current))
    if seated.count("digest") < plan.size - seated.count("gone"):
        return None
    digests = sorted(seated.values("digest"))
    if len(digests) > 1:
        return _different(membership, plan, digests)
    digest = digests[0]
    if not plan.stages:
        return End(outcome="finished", reason="every rank has returned", digest=digest)
    # Whoever has told its part and died since has told the truth all the same.
    members = [membership.members[number] for number in plan.members]
    parts = [member.part for member in members if member.part is not None]
    if parts or _state_is_lost(membership, plan):
        try:
            digest = put_together(parts)
        except ValueError as error:
            if _state_is_lost(membership, plan):
                return None  # before anybody told what it was
            return EndsDiffer(reason=f"ranks ended with different states: {error}")
    return End(outcome="finished", reason="every rank has returned", digest=digest)


def _different(membership: Membership, plan: Plan, digests: list[str]) -> EndsDiffer:
    returned = [membership.members[number].objects for number in plan.members]
    pairs = sorted({pair for objects in returned for pair in objects})
    names = sorted({name for name, digest in pairs if any(each == name and other != digest for each, other in pairs)})
    what = f" in {', '.join(names)}" if names else ""
    reason = (
        f"ranks ended with different states{what} (digests {', '.join(digests)}): something that is not equal on all "
        "ranks has found its way into the last step; `resilient check` finds such loops"
    )
    told = [membership.members[number].digest for number in plan.members]
    numbers = [NOBODYS if digest is None else digests.index(digest) for digest in told]
    odd = odd_ones(numbers) if not plan.stages else ()
    return EndsDiffer(reason=reason, suspects=tuple(plan.members[rank] for rank in odd))


def _state_is_lost(membership: Membership, plan: Plan) -> bool:
    """Whether something of it was on ranks only that are gone."""
    gone = {rank for rank, member in enumerate(plan.members) if membership.is_gone(member)}
    return bool(gone) and (plan.sharded or any(gone.issuperset(stage.ranks) for stage in plan.stages))


def _somebody_is_left_alone(seated: Tally) -> bool:
    returned = seated.values("returned")
    if len(returned) == 1:
        return any(step >= min(returned) for step in seated.values("waiting"))
    return len(returned) > 1


def _left_alone(membership: Membership, plan: Plan, current: Plan) -> str:
    seated = [member for number in plan.members if not (member := membership.members[number]).gone]
    early, other, step = next(
        (early, other, step)
        for early in seated
        for other in seated
        if early.returned_at is not None and (step := _went_on_to(other, early.returned_at)) is not None
    )
    return (
        f"rank {current.rank_in_words(early.number)} left the training loop at step {early.returned_at}, rank "
        f"{current.rank_in_words(other.number)} went on to step {step}: leave it only on what is equal "
        'on all ranks, such as run.step or run.reduced("loss")'
    )


def _went_on_to(other: Member, left_at: int) -> int | None:
    """The step that this member came to, if it is a later one than that at which another has left for good."""
    if other.returned_at is not None:
        return other.returned_at if other.returned_at > left_at else None
    theirs = other.report
    return theirs.step if theirs is not None and theirs.waiting and theirs.step >= left_at else None
