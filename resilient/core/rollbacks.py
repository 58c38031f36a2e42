"""Going back because ranks ask for it: for a loss that is not finite, states that differ, or the user's own wish."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .ending import EndsDiffer
from .plan import Plan
from .seat import Rollback

if TYPE_CHECKING:
    from .control import Control


@dataclass(slots=True, kw_only=True)
class Rollbacks:
    control: Control = field(repr=False, compare=False)
    _asked: tuple[int, Rollback | None] = (0, None)
    """A branch, and what was asked for last by ranks that were on it."""
    _ends: Rollback | None = None
    """What followed when ranks had ended with different states."""

    def ends_differ(self, found: EndsDiffer, plan: Plan) -> None:
        """All have returned, and nobody will ask for anything. What is computed again by others comes out right, if no
        more than a bit had changed by itself; once must do."""
        members = [self.control.membership.members[number] for number in plan.members]
        back_to = max(member.verified for member in members)
        if self._ends or back_to < 0 or not self.control.limits.snapshots:
            again = "; it came again when the last steps were computed a second time" if self._ends else ""
            self.control.fail(f"{found.reason}{again}")
            return
        self._ends = wanted = Rollback(
            back_to=back_to, skip_from=0, skip_to=-1, why=found.reason, suspects=found.suspects
        )
        self._asked = plan.branch, wanted
        suspected = set(found.suspects)
        self.control.deaths.let_go([member for member in members if member.number not in suspected], found.reason)

    def wanted(self) -> Rollback | None:
        """What seated ranks ask for, or have asked for on this branch. They all do, but one is enough, also if it dies
        then: the others may not have learned of it."""
        formed, current = self.control.formed, self.control.current
        if formed is None or current is None:
            return None
        if asks := self._asks(formed):
            self._asked = formed.branch, max(asks, key=_known_by)
        branch, asked = self._asked
        # A planned change is reached only over an exchange, which whoever wants to go back does not take part in.
        # After the end nobody forms an unplanned one, either.
        over = asked is self._ends and current.kind == "unplanned"
        if formed is not current and current.kind != "planned" and not over:
            return None
        return asked if branch == formed.branch else None

    def _asks(self, formed: Plan) -> list[Rollback]:
        """Of those who have done what was asked for before, some may not have told so yet."""
        membership = self.control.membership
        reports = (membership.members[number].report for number in sorted(membership.tally(formed).numbers("rollback")))
        return [
            report.rollback
            for report in reports
            if report is not None and report.rollback is not None and report.generation >= formed.since
        ]


def _known_by(rollback: Rollback) -> tuple[bool, int, str]:
    """Of those that ranks ask for after the same, the one by whoever has learned most is the greatest."""
    return bool(rollback.suspects), rollback.back_to, rollback.why
