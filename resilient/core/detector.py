"""Who is dead: verdicts from signs of life, as a pure function of facts and time.

What the operating system says is believed at once: a keeper that sees a process end (pidfd), a
connection that the kernel closed. Silence takes longer:
    * a node whose keeper is silent for `detection_s` is dead;
    * a process that the kernel shows as stopped for `detection_s` is dead;
    * a rank that computes, and whose work counter stands still for longer than it ever has to, is hung.
      Only computing ranks can be hung: when one hangs, all others wait. The first iteration and
      declared pauses are exempt.
Time in which the controller itself did not run counts against nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

HUNG_AT_LEAST_S = 60.0
HUNG_TIMES_LONGEST = 10.0
ALL_SILENT_TIMES = 3.0

Activity = Literal["starting", "computing", "waiting", "paused", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vital:
    """What a keeper sees of one rank."""

    member: int
    alive: bool
    stopped: bool
    """The kernel shows the process as stopped (by a signal or a debugger)."""
    activity: Activity
    work: int
    """Counter of finished pieces of work; its value means nothing, only that it moves."""
    longest_s: float
    """Longest time between two of its movements so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A process or a node to be declared dead, and killed."""

    what: Literal["rank", "node"]
    member: int = 0
    node: str = ""
    why: str
    silent_s: float


@dataclass(slots=True)
class _Rank:
    node: str
    vital: Vital
    moved_at: float
    stopped_at: float | None = None


@dataclass(slots=True, kw_only=True)
class Detector:
    detection_s: float
    hung_at_least_s: float = HUNG_AT_LEAST_S
    nodes: dict[str, float] = field(default_factory=dict)
    """When each node's keeper was last heard."""
    ranks: dict[int, _Rank] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    """Processes whose end has been told."""
    _looked_at: float | None = None

    def expect(self, node: str, now: float) -> None:
        """A node that ought to be heard from now on: after a restart, those where ranks are on record."""
        self.nodes.setdefault(node, now)

    def excuse(self, node: str, until: float) -> None:
        """This node's keeper is being replaced: its silence counts only from then on."""
        self.nodes[node] = max(until, self.nodes.get(node, until))

    def beat(self, node: str, vitals: tuple[Vital, ...], now: float) -> tuple[Verdict, ...]:
        """A keeper's heartbeat. Processes that have ended are verdicts at once."""
        self.nodes[node] = now
        dead = []
        for vital in vitals:
            if not vital.alive:
                self.ranks.pop(vital.member, None)
                if vital.member not in self.ended:  # whatever it did last: a restarted controller may ask for it
                    self.ended.add(vital.member)
                    why = "the process has ended"
                    dead.append(Verdict(what="rank", member=vital.member, node=node, why=why, silent_s=0.0))
                continue
            known = self.ranks.get(vital.member)
            if known is None:
                known = self.ranks[vital.member] = _Rank(node, vital, now)
            if (vital.work, vital.activity) != (known.vital.work, known.vital.activity):
                known.moved_at = now
            if not vital.stopped:
                known.stopped_at = None
            elif known.stopped_at is None:
                known.stopped_at = now
            known.vital = vital
        return tuple(dead)

    def node_ended(self, node: str, now: float) -> Verdict:
        """All connections to a node's processes were closed by its kernel."""
        heard = self.nodes.get(node, now)
        self.forget_node(node)
        return Verdict(what="node", node=node, why="all its processes have ended", silent_s=max(0.0, now - heard))

    def forget_node(self, node: str) -> None:
        self.nodes.pop(node, None)
        self.ranks = {member: rank for member, rank in self.ranks.items() if rank.node != node}

    def forget_rank(self, member: int) -> None:
        self.ranks.pop(member, None)

    def verdicts(self, now: float) -> tuple[Verdict, ...]:
        """To be asked often; a gap between two calls is taken off everybody's silence."""
        self._excuse(now)
        found = [
            Verdict(what="node", node=node, why="its keeper has fallen silent", silent_s=now - heard)
            for node, heard in sorted(self.nodes.items())
            if now - heard > self._silence_limit_s(now)
        ]
        silent_nodes = {verdict.node for verdict in found}
        for member, rank in sorted(self.ranks.items()):
            if rank.node not in silent_nodes and (verdict := self._verdict(member, rank, now)) is not None:
                found.append(verdict)
        for verdict in found:
            if verdict.what == "node":
                self.forget_node(verdict.node)
            else:
                self.forget_rank(verdict.member)
        return tuple(found)

    def _silence_limit_s(self, now: float) -> float:
        """When all nodes are silent at once, it is more likely the controller that does not hear."""
        all_silent = all(now - heard > self.detection_s for heard in self.nodes.values())
        return ALL_SILENT_TIMES * self.detection_s if all_silent else self.detection_s

    def _verdict(self, member: int, rank: _Rank, now: float) -> Verdict | None:
        if rank.stopped_at is not None and now - rank.stopped_at > self.detection_s:
            why, silent_s = "the process is stopped", now - rank.stopped_at
        else:
            limit_s = max(self.hung_at_least_s, HUNG_TIMES_LONGEST * rank.vital.longest_s)
            if rank.vital.activity != "computing" or rank.vital.work <= 1 or now - rank.moved_at <= limit_s:
                return None
            why, silent_s = (
                f"no progress for {now - rank.moved_at:.0f} s while computing",
                now - rank.moved_at,
            )
        return Verdict(what="rank", member=member, node=rank.node, why=why, silent_s=silent_s)

    def _excuse(self, now: float) -> None:
        """Take the time in which the controller did not look off everybody's silence: on a busy machine
        that may be many small gaps."""
        before, self._looked_at = self._looked_at, now
        if before is None or now - before <= self.detection_s / 4:
            return
        gap = now - before
        self.nodes = {node: heard + gap for node, heard in self.nodes.items()}
        for rank in self.ranks.values():
            rank.moved_at += gap
            if rank.stopped_at is not None:
                rank.stopped_at += gap
