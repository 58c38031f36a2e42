"""Who is gone, and what that means: killed, so that it can't wake up and write; counted, and told.

lost, or a machine error    counted against the budget of failures, unless it was leaving anyway
its bits are wrong          the same, and nobody else is placed on that node
left behind                 killed, and nobody's failure: the others went on without it
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .events import NodeGone, RankCrashed, RankGone, RankPending
from .failures import Crash, Failures
from .instructions import Kill
from .situation import needs_base
from .standing import Member

if TYPE_CHECKING:
    from .control import Control


@dataclass(slots=True, kw_only=True)
class Deaths:
    control: Control = field(repr=False, compare=False)
    failures: Failures

    # Facts

    def node_gone(self, event: NodeGone) -> None:
        control, why = self.control, f"node {event.node[:8]}: {event.why}"
        control.membership.node_gone(event.node)
        control.going_back.changed()
        members = control.membership.on_node(event.node)
        self._count(members, why)
        for member in members:
            self._declare_gone(member, why, event.silent_s, node_lost=True)
        control.starting.node_gone(event.node)
        control.leaving.node_gone(event.node)

    def rank_gone(self, event: RankGone) -> None:
        member = self.control.membership.members.get(event.member)
        if member is not None and not member.gone:
            self._count([member], f"a rank on node {member.node[:8]}: {event.why}")
            self._declare_gone(member, event.why, event.silent_s, node_lost=False)

    def rank_pending(self, event: RankPending) -> None:
        member = self.control.membership.members.get(event.member)
        if member is not None and member.ready is None:
            self.let_go([member], event.why)

    def rank_crashed(self, event: RankCrashed) -> None:
        member = self.control.membership.members.get(event.member)
        if member is None or member.gone:
            return
        reason = self.failures.crashed(event.step, Crash(member.number, member.node, event.traceback))
        if reason is not None:
            self.control.fail(reason)
            return
        error = event.traceback.rstrip().rpartition("\n")[2]
        self.rank_gone(RankGone(member=event.member, why=f"machine error in step {event.step}: {error}"))

    # Decisions

    def replace(self, suspects: tuple[int, ...], why: str) -> None:
        membership = self.control.membership
        for member in (membership.members[number] for number in suspects):
            if not member.gone:
                self._count([member], why)
                membership.avoid(member.node)
                self._declare_gone(member, why, 0.0, node_lost=False)

    def kill_strays(self) -> None:
        """Ranks that hold state of a generation that the others went on without."""
        formed, current = self.control.formed, self.control.current
        if formed is None or current is None or formed.generation != current.generation:
            return
        self.let_go(self.control.membership.strays(current), f"left out of generation {current.generation}")

    def let_go(self, members: list[Member], why: str) -> None:
        """Nobody needs these any more; no failures of theirs."""
        for member in members:
            if not member.gone:
                member.gone = True
                self.control.unheard.discard(member.number)
                self.control.membership.changed(member)
                self._kill(member, why)

    def _count(self, lost: list[Member], why: str) -> None:
        """Not what had died before this controller came, of which it has not heard; nor what was leaving anyway."""
        if all(member.number in self.control.unheard or member.leaving for member in lost):
            return
        if (reason := self.failures.lost(self.control.now)) is not None:
            self.control.fail(f"{reason}; the last one: {why}")

    def _declare_gone(self, member: Member, why: str, silent_s: float, *, node_lost: bool) -> None:
        control, seat = self.control, self._seat_of(member)
        member.gone = True
        control.timings.forget([member.number])
        control.membership.changed(member)
        control.unheard.discard(member.number)
        control.starting.died(member)
        self._kill(member, why)
        if seat is not None:
            control.chronicle.lost(seat, member.node, why, silent_s, control.now, node_lost=node_lost)

    def _kill(self, member: Member, why: str) -> None:
        self.control.instruct((Kill(member=member.number, node=member.node, reason=why),))

    def _seat_of(self, member: Member) -> int | None:
        """The rank of a member that is still needed."""
        control, formed, current = self.control, self.control.formed, self.control.current
        if current is None or member.number in current.ranks:
            return None if current is None else current.ranks[member.number]
        if formed is None or control.unheard or not needs_base(control.membership, formed, current):
            return None
        return formed.ranks.get(member.number)
