"""What a decision about the next generation depends on, and what may come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .limits import Limits
from .membership import Membership
from .plan import Plan
from .staging import Measured
from .standing import Tally


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
    """For how long a link of the current generation has been reported broken, or it stands still."""
    waited_s: float
    """For how long enough ranks to begin have been ready."""
    stands_still: bool = False
    """Whether its members wait for each other, and nothing comes."""
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


def broken(membership: Membership, formed: Plan | None, current: Plan) -> bool:
    """Whether living members of the current generation say that their group's link broke."""
    if not groups(current).isdisjoint(membership.tally(current).values("broken")):
        return True
    if formed is None or formed.generation not in membership.tally(formed).values("broken"):
        return False
    return needs_base(membership, formed, current)


def stands_still(membership: Membership, formed: Plan | None, current: Plan) -> bool:
    """Whether all living members wait for each other, and nothing comes."""

    def all_wait(plan: Plan) -> bool:
        tally = membership.tally(plan)
        living = plan.size - tally.count("gone")
        return living > 1 and len(tally.numbers("stalled", groups(current))) == living

    if not all_wait(current):
        return False
    return formed is None or not needs_base(membership, formed, current) or all_wait(formed)


def needs_base(membership: Membership, formed: Plan, current: Plan) -> bool:
    """Whether the current generation leaves members of its base out, and may not be reached without them: as long as
    not all have switched to it, over an exchange of the base.
    """
    if current is formed or current.kind != "planned" or formed.ranks.keys() <= current.ranks.keys():
        return False
    reports = (membership.members[number].report for number in current.members if number in formed.ranks)
    return any(report is None or report.generation < current.generation for report in reports)


def groups(current: Plan) -> set[int]:
    """Whose links matter. Beside the group of the current generation it may be that of its base, as long as members
    have not switched: a planned generation is reached only over an exchange of its base.
    """
    return {current.generation, current.base} if current.kind == "planned" else {current.generation}


def finished(seated: Tally) -> bool:
    """Whether any of them is through with the loop."""
    return bool(seated.values("left") or seated.values("digest"))
