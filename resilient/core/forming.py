"""Generations: decided, created under a number of their own, sent to their members, formed.

    decided -> key created (CreateGeneration / GenerationCreated) -> sent to its members -> formed, as soon as one
               \\-- taken by somebody else: another controller rules                       member reports so

Only one is under way at a time. A formation that fails is followed by a new number, never by the old one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snapshot.core.branches import Lineage

from .events import GenerationCreated, GenerationTaken, RankReported, Resumed
from .instructions import CreateGeneration, SendPlan
from .plan import Plan
from .standing import Member

if TYPE_CHECKING:
    from .control import Control


@dataclass(slots=True, kw_only=True)
class Forming:
    control: Control = field(repr=False, compare=False)
    inherited: int = 0
    """The newest generation that an earlier controller has made."""
    _dealt_again: int = 0
    """Micro-batches of members that the generation which is being created goes on without."""

    def make(self, plan: Plan) -> None:
        control, formed = self.control, self.control.formed
        control.creating, control.newest = plan, plan.generation
        lost = formed.ranks.keys() - plan.ranks.keys() if formed is not None and plan.kind == "unplanned" else ()
        self._dealt_again = sum(len(formed.leaves_of(member)) for member in lost) if formed is not None else 0
        control.for_s("waiting", False)
        control.instruct((CreateGeneration(plan=plan),))

    # Facts

    def resumed(self, event: Resumed) -> None:
        control, members = self.control, self.control.membership.members
        assert control.newest == 0 and not members, "resumed twice"
        for number, node in event.spawned:
            control.new_member(number, node)
        control.plans = {plan.generation: plan for plan in event.plans}
        for place in (place for plan in event.plans for place in plan.places):
            control.new_member(place.member, place.node)
        if event.plans:
            current = event.plans[-1]
            control.newest = self.inherited = current.generation
            control.restoring.lineage = Lineage(branches=current.branches)
            control.going_back.resumed(event.plans)
            control.chronicle.resumed(event.plans)
            self._rule(formed=control.plans.get(current.base), current=current)  # plans come only from what has formed
        for number in set(event.gone) - set(event.plans[-1].members if event.plans else ()):
            # Those of the newest generation are news: nobody has made one without them yet.
            members[number].gone = True
            control.membership.changed(members[number])
        control.unheard = {member.number for member in control.membership.alive()}
        control.never_seated = control.unheard.difference(*(plan.members for plan in event.plans))

    def created(self, event: GenerationCreated) -> None:
        control, created = self.control, self.control.creating
        if created is None or event.generation != created.generation:
            return
        control.creating = None
        control.plans[event.generation] = created
        self._rule(formed=control.formed, current=created)
        control.restoring.lineage = Lineage(branches=created.branches)
        control.for_s("broken", False)
        left_out = self._left_out()
        control.chronicle.created(created, control.now, drained=bool(left_out), dealt_again=self._dealt_again)
        for number in (*created.members, *sorted(left_out)):
            self._send(control.membership.members[number], created)

    def taken(self, event: GenerationTaken) -> None:
        creating, newest = self.control.creating, self.control.newest
        if event.generation > newest or (creating is not None and event.generation == newest):
            self._superseded(event.generation)

    def reported(self, event: RankReported) -> None:
        control, report = self.control, event.report
        member = control.membership.members.get(report.member)
        if member is None or member.gone:
            return
        control.unheard.discard(report.member)
        if report.generation > control.newest:
            self._superseded(report.generation)
            return
        if member.report is not None and report.serial < member.report.serial:
            return
        member.report = report
        control.timings.take(report.member, report.layer_s)
        control.bubbles.take(report.member, report.bubbles)
        control.membership.changed(member)
        plan = control.plans.get(report.formed)
        if plan is not None and self._counts_as_formed(report.member, report.formed):
            self._rule(formed=plan, current=control.current)
            control.going_back.formed()
            self._forget_before(report.formed)
            control.chronicle.formed(report.formed, report.complete, control.now)
        control.chronicle.committed(report.formed, report.complete, control.now)
        self._send_again(member)

    def _rule(self, *, formed: Plan | None, current: Plan | None) -> None:
        self.control.formed, self.control.current = formed, current
        self.control.membership.keep(formed, current)

    def _superseded(self, generation: int) -> None:
        self.control.end("superseded", f"generation {generation} was created by another controller")

    def _counts_as_formed(self, number: int, generation: int) -> bool:
        """A report of a superseded generation counts only from those who matter now."""
        formed, current = self.control.formed, self.control.current
        if formed is not None and generation <= formed.generation:
            return False
        if current is None or generation == current.generation or number in current.ranks:
            return True
        return formed is not None and self.control.membership.tally(formed).count("gone") == formed.size

    def _forget_before(self, oldest: int) -> None:
        control = self.control
        control.plans = {number: plan for number, plan in control.plans.items() if number >= oldest}
        for number in control.membership.forget_gone(control.plans.values()):
            control.bubbles.forget(number)
            control.starting.mine.discard(number)

    # Plans to members

    def _left_out(self) -> set[int]:
        """Members of the last formed generation whom a planned one goes on without: it is reached only with them."""
        formed, current = self.control.formed, self.control.current
        if formed is None or current is None or current.kind != "planned":
            return set()
        return formed.ranks.keys() - current.ranks.keys()

    def _send(self, member: Member, plan: Plan) -> None:
        if not member.gone:
            member.plan_sent_at = self.control.now
            self.control.instruct((SendPlan(member=member.number, plan=plan),))

    def _send_again(self, member: Member) -> None:
        control, current = self.control, self.control.current
        if current is None or member.report is None:
            return
        if member.number not in current.ranks and member.number not in self._left_out():
            return
        behind = member.report.generation < current.generation
        if behind and control.now - member.plan_sent_at >= control.limits.resend_s:
            self._send(member, current)
