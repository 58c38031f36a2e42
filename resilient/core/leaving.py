"""Nodes and ranks that were asked to leave, until nothing of them is needed any more.

    asked --seated ranks: a planned generation without them (draining.py)--> released, each when it is at rest
    node without ranks --a snapshot of a later generation is protected--> let go --NodeDrained--> drained

Rules
    * No rank is placed on a node that was asked to leave, for as long as it is. A rank there that has never had a seat
      is released at once.
    * A rank is released when every generation that may still form goes on without it, and it has told all it has to
      tell.
    * A keeper is let go when a snapshot that it has no part in is protected everywhere, not before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

from .chronicle import Chronicle
from .events import NodeDrained, NodeLeaving, RankLeaving, SnapshotProtected
from .instructions import Instruction, Kill, LetGo
from .limits import Limits
from .membership import Membership
from .plan import Plan
from .standing import Member

if TYPE_CHECKING:
    from .control import Control

CHANGE_DETECTIONS = 5
CHANGE_STEPS = 2
"""What a planned change takes: forming and exchanging, and the steps until all hold the plan."""

MOST_OVER = 1000
"""So many nodes that have left are shown."""


class LeavingView(TypedDict):
    state: Literal["leaving", "drained"]
    why: str
    waits_for: str
    """Empty if it is drained, or stuck."""
    stuck: str
    """Why it can't leave as long as nothing changes: too few workers would be left."""


@dataclass(slots=True, kw_only=True)
class Leaving:
    control: Control = field(repr=False, compare=False)
    why: dict[str, str] = field(default_factory=dict)
    """By node that was asked to leave."""
    drained: set[str] = field(default_factory=set)
    protected: int = 0
    """The newest generation of which a snapshot is protected everywhere."""
    stuck: str = ""
    """Why those that were asked to leave can't, if they can't."""
    _asked: set[int] = field(default_factory=set)
    """Ranks, by themselves."""
    _without: dict[str, int] = field(default_factory=dict)
    """By node without ranks, the first generation that formed without it."""
    _letting_go: set[str] = field(default_factory=set)
    _over: dict[str, None] = field(default_factory=dict)
    """Nodes that were asked to leave and have gone, in this order."""

    @property
    def _limits(self) -> Limits:
        return self.control.limits

    @property
    def _membership(self) -> Membership:
        return self.control.membership

    @property
    def _chronicle(self) -> Chronicle:
        return self.control.chronicle

    # Facts

    def node_leaves(self, event: NodeLeaving) -> None:
        if event.node not in self.why:
            self.control.say(f"node {event.node[:8]} is to leave{_in_time(event.left_s)}: {event.why}")
        self.why.setdefault(event.node, event.why)
        self._membership.node_leaves(event.node, self.control.now + event.left_s)

    def rank_leaves(self, event: RankLeaving) -> None:
        member = self._membership.members.get(event.member)
        if member is None or member.gone or member.number in self._asked:
            return
        self._asked.add(member.number)
        where = f"(member {member.number}, node {member.node[:8]})"
        self.control.say(f"a rank {where} is to leave{_in_time(event.left_s)}: {event.why}")
        self._membership.member_leaves(member, self.control.now + event.left_s)

    def snapshot_protected(self, event: SnapshotProtected) -> None:
        self.protected = max(self.protected, event.generation)

    def node_drained(self, event: NodeDrained) -> None:
        if event.node in self._letting_go:
            self._letting_go.discard(event.node)
            self.drained.add(event.node)
            self._membership.node_gone(event.node)
            self.control.say(f"node {event.node[:8]} is drained: nothing of the run is on it")

    def node_seen(self, node: str) -> None:
        """Its keeper is there, whatever was known."""
        self.drained.discard(node)
        self._over.pop(node, None)

    def node_gone(self, node: str) -> None:
        self._letting_go.discard(node)
        if node in self.why:
            self.drained.add(node)
            self._over[node] = None
        if len(self._over) > MOST_OVER:
            self._forget(next(iter(self._over)))

    def _forget(self, node: str) -> None:
        """It left long ago, and has gone."""
        del self._over[node], self.why[node]
        self.drained.discard(node)
        self._without.pop(node, None)
        self._membership.leaving.pop(node, None)

    # What follows

    def may_wait_s(self, current: Plan | None) -> float:
        """How long those with a seat may still wait for others to take their place."""
        seated = [member for member in self._membership.leavers() if current and member.number in current.ranks]
        waited_s = self.control.for_s("leaving", bool(seated))
        if not seated:
            return 0.0
        change_s = CHANGE_DETECTIONS * self._limits.detection_s + CHANGE_STEPS * self._chronicle.step_s
        left_s = min(member.leave_by for member in seated) - self.control.now
        return min(self._limits.start_together_s - waited_s, left_s - change_s)

    def stays(self, stuck: str) -> None:
        if stuck and stuck != self.stuck:
            self.control.say(f"who was asked to leave can't, {stuck}")
        self.stuck = stuck

    def release(self) -> None:
        """Ranks that no generation which may still form has a seat for."""
        control = self.control
        formed, forming = control.formed, control.current if control.current is not control.formed else None
        hopeless = forming is not None and bool(self._membership.tally(forming).values("gone"))
        for member in self._membership.leavers():
            planned = any(member.number in plan.ranks for plan in control.plans.values())
            # What has lost somebody will not form any more; it may have, which would be told by then.
            joins_in_vain = hopeless and (formed is None or member.number not in formed.ranks)
            waited_s = control.for_s(f"release {member.number}", joins_in_vain or not planned)
            ready = not planned and self._has_nothing(member)
            if not ready and waited_s < self._limits.start_together_s:
                continue
            member.gone = True
            self._membership.changed(member)
            why = "nobody needs it any more" if ready else "it did not come to rest in time"
            control.for_s(f"release {member.number}", False)
            control.instruct((Kill(member=member.number, node=member.node, reason=why, released=True),))

    def _has_nothing(self, member: Member) -> bool:
        """Nothing to do or to tell: also if the others completed its last exchange, and it did not."""
        report = member.report
        return report is None or report.generation == 0 or report.at_rest or report.broken == report.generation

    def let_go(self) -> tuple[Instruction, ...]:
        """Keepers of nodes on which nobody is left."""
        control = self.control
        if control.formed is None or control.formed is not control.current:
            return ()
        found: list[Instruction] = []
        asked = self.why.keys() - self.drained - self._letting_go
        for node in sorted(asked - {place.node for place in control.formed.places} if asked else ()):
            if self._membership.on_node(node):
                continue
            without = self._without.setdefault(node, control.formed.generation)
            if not self._limits.snapshots or self.protected >= without:
                self._letting_go.add(node)
                found.append(LetGo(node=node))
        return tuple(found)

    # Shown

    def view(self) -> dict[str, LeavingView]:
        """By node that was asked to leave."""
        return {node: self._view(node) for node in sorted(self.why)}

    def _view(self, node: str) -> LeavingView:
        state: Literal["leaving", "drained"] = "drained" if node in self.drained else "leaving"
        ranks = len(self._membership.on_node(node))
        stuck = self.stuck if ranks else ""
        if state == "drained" or stuck:
            waits_for = ""
        elif ranks:
            waits_for = f"{ranks} {'rank' if ranks == 1 else 'ranks'} to leave it"
        elif node in self._letting_go:
            waits_for = "its keeper to finish"
        else:
            waits_for = "a snapshot of the ranks that are left to be protected"
        return LeavingView(state=state, why=self.why[node], waits_for=waits_for, stuck=stuck)


def _in_time(left_s: float) -> str:
    return "" if left_s == float("inf") else f" within {left_s:.0f} s"
