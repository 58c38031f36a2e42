"""What decisions ask of members, counted as it changes: no event walks all of them.

A `Tally` holds, for some members, who stands how. It can be counted from scratch at any time; `Membership` keeps those
of the plans that matter now, and takes members in and out as facts arrive.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from snapshot.core.digest import StatePart

from .events import RankReady
from .plan import Place
from .seat import SeatReport

What = Literal[
    "gone",
    "leaving",
    "starting",
    "ready",
    "holding",
    "broken",
    "stalled",
    "left",
    "returned",
    "waiting",
    "rollback",
    "digest",
]
Fact = tuple[What, Hashable]


@dataclass(slots=True, kw_only=True)
class Member:
    """One incarnation of a rank."""

    number: int
    node: str
    gone: bool = False
    leaving: bool = False
    """Asked to leave, by itself or with its node."""
    leave_by: float = float("inf")
    """Until when it lives, as far as is known; controller's clock."""
    ready: RankReady | None = None
    report: SeatReport | None = None
    digest: str | None = None
    """Set when the user's function has returned."""
    returned_at: int | None = None
    """The step that it had come to then; reports may be older."""
    objects: tuple[tuple[str, str], ...] = ()
    """Of each object in the state that it returned with, name and digest."""
    verified: int = -1
    """The newest step at whose start it knows that all ranks held the same state."""
    part: StatePart | None = None
    """The same, of a rank that holds a part of the state; then `digest` is that of the state's structure."""
    plan_sent_at: float = float("-inf")

    @property
    def place(self) -> Place:
        assert self.ready is not None, self
        return Place(member=self.number, node=self.node, address=self.ready.address)


def standing(member: Member | None) -> tuple[Fact, ...]:
    """How a member stands. Of one that is gone, or was never heard of, nothing else counts.

    leaving: is to leave; then it is not counted as starting or ready, since it will not be seated any more.
    starting: has not reached its loop. ready: has, and holds no state. holding: has seen a generation formed.
    broken: the generation that it is in, if a link of that broke. stalled: the same, if it waits and
    nothing comes. left, waiting: the step at which it has left a loop,
    perhaps to begin another one, or waits for the others. returned: the same step if its function has returned.
    rollback, digest: what it asks for, what it returned with.
    """
    if member is None or member.gone:
        return (("gone", True),)
    facts: list[Fact] = [("leaving", True)] if member.leaving else []
    report = member.report
    if report is not None and report.formed > 0:
        facts.append(("holding", True))
    elif member.ready is not None and not member.leaving:
        facts.append(("ready", True))
    if member.ready is None and not member.leaving:
        facts.append(("starting", True))
    if member.digest is not None:
        facts.append(("digest", member.digest))
    if report is not None:
        facts += _reported(report)
    if member.returned_at is not None:
        facts.append(("returned", member.returned_at))
    return tuple(facts)


def _reported(report: SeatReport) -> Iterable[Fact]:
    if report.broken and report.broken == report.generation:
        yield "broken", report.broken
    if report.stalled:
        yield "stalled", report.generation
    if report.finished:
        yield "left", report.step
    elif report.waiting:
        yield "waiting", report.step
    if report.rollback is not None:
        yield "rollback", report.rollback


@dataclass(slots=True)
class Tally:
    _numbers: dict[What, dict[Any, set[int]]] = field(default_factory=dict)

    def add(self, number: int, facts: Iterable[Fact]) -> None:
        for what, value in facts:
            self._numbers.setdefault(what, {}).setdefault(value, set()).add(number)

    def remove(self, number: int, facts: Iterable[Fact]) -> None:
        for what, value in facts:
            numbers = self._numbers[what][value]
            numbers.remove(number)
            if not numbers:
                del self._numbers[what][value]

    def copy(self) -> Tally:
        kept = {what: {value: set(found) for value, found in by.items()} for what, by in self._numbers.items()}
        return Tally(kept)

    def values(self, what: What) -> Collection[Any]:
        """All that some member stands at; empty if nobody stands so."""
        return self._numbers.get(what, {}).keys()

    def count(self, what: What) -> int:
        return sum(map(len, self._numbers.get(what, {}).values()))

    def numbers(self, what: What, values: Collection[Any] | None = None) -> set[int]:
        """Those who stand so; at one of these values if some are given."""
        found = self._numbers.get(what, {})
        return set[int]().union(*(found[value] for value in found if values is None or value in values))
