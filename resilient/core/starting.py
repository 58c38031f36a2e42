"""Ranks that are started because there are fewer than wanted, until they reach their loop, or die before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .events import RankReady
from .instructions import Spawn
from .situation import finished
from .standing import Member

if TYPE_CHECKING:
    from .control import Control

STARTS_THAT_MAY_FAIL = 3
"""Ranks that may die in a row before any has reached its loop, on nodes that live."""


@dataclass(slots=True, kw_only=True)
class Starting:
    """failed: since the last rank that reached its loop. Not counted are those whose node has died, and those that an
    earlier controller started."""

    control: Control = field(repr=False, compare=False)
    mine: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)

    def rank_ready(self, event: RankReady) -> None:
        """It has reached its loop: it must be the same as the others', and compute the same bits."""
        control = self.control
        member = control.new_member(event.member, event.node)
        if member.gone:
            return
        self.failed.clear()
        first = control.membership.first_ready() or event
        member.ready = event
        control.membership.changed(member)
        if (event.micro_batches, event.steps) != (first.micro_batches, first.steps):
            control.fail(
                f"ranks disagree about their loop: {event.micro_batches} micro-batches and {event.steps} steps in "
                f"one, {first.micro_batches} and {first.steps} in another; every rank must run the same script"
            )
        elif event.probe != first.probe:
            self._different_bits(event, first)

    def _different_bits(self, event: RankReady, first: RankReady) -> None:
        what = (
            f"node {event.node[:8]} computes other bits than node {first.node[:8]}: {event.probe_fields} "
            f"against {first.probe_fields}"
        )
        if self.control.allow_different_bits:
            self.control.say(f"warning: {what}; the result may differ in its last bits")
        else:
            self.control.fail(f"{what}; use equal machines, or allow it with allow_different_bits=True")

    def died(self, member: Member) -> None:
        if member.ready is None and not member.leaving and member.number in self.mine:
            self.failed[member.number] = member.node

    def node_gone(self, node: str) -> None:
        self.failed = {member: on for member, on in self.failed.items() if on != node}

    def spawn_missing(self) -> None:
        control, limits = self.control, self.control.limits
        if control.current is not None and finished(control.membership.tally(control.current)):
            return
        if self._fails():
            return
        while control.membership.count_staying() < limits.max_workers + limits.spares:
            node = control.membership.roomiest()
            if node is None:
                return
            member = control.new_member(control.next_member, node)
            self.mine.add(member.number)
            control.instruct((Spawn(member=member.number, node=node, reason="fewer ranks than wanted"),))

    def _fails(self) -> bool:
        """Whether no more ranks are to be started now, because the last ones have not lived long enough."""
        failed = len(self.failed)
        failing = failed >= STARTS_THAT_MAY_FAIL
        # Time for the verdict that their node has died, which would explain it.
        if self.control.for_s("failing starts", failing) > 4 * self.control.limits.detection_s:
            self.control.fail(
                f"{failed} ranks in a row died before they reached the training loop; the workers' logs say why"
            )
        return failing
