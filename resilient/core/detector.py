"""Who is dead: verdicts from signs of life, as a pure function of facts and time.

What the operating system says is believed at once: a keeper that sees a process end (pidfd), a
connection that the kernel closed. Silence takes longer:
    * a node whose keeper is silent for `detection_s` is dead;
    * a process that the kernel shows as stopped for `detection_s` is dead;
    * a rank that computes, and whose work counter stands still for longer than it ever has to, is hung.
      Only computing ranks can be hung: when one hangs, all others wait. The first iteration and
      declared pauses are exempt.
Time in which the controller itself did not run counts against nobody.

Nobody can be dead before a certain time that the last sign of life tells: only then one is looked at. So a heartbeat
costs what its node's ranks cost, and a look what there is to see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .reminders import Reminders

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
    _members: dict[str, set[int]] = field(default_factory=dict)
    """By node, those in `ranks`."""
    _look_at_nodes: Reminders[str] = field(default_factory=Reminders)
    _look_at_ranks: Reminders[int] = field(default_factory=Reminders)
    _looked_at: float | None = None

    def expect(self, node: str, now: float) -> None:
        """A node that ought to be heard from now on: after a restart, those where ranks are on record."""
        if node not in self.nodes:
            self._heard(node, now)

    def _heard(self, node: str, at: float) -> None:
        self.nodes[node] = at
        self._look_at_nodes.by(at + self.detection_s, node)

    def excuse(self, node: str, until: float) -> None:
        """This node's keeper is being replaced: its silence counts only from then on."""
        self._heard(node, max(until, self.nodes.get(node, until)))

    def beat(self, node: str, vitals: tuple[Vital, ...], now: float) -> tuple[Verdict, ...]:
        """A keeper's heartbeat. Processes that have ended are verdicts at once."""
        self._heard(node, now)
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
                self._members.setdefault(node, set()).add(vital.member)
            if (vital.work, vital.activity) != (known.vital.work, known.vital.activity):
                known.moved_at = now
            if not vital.stopped:
                known.stopped_at = None
            elif known.stopped_at is None:
                known.stopped_at = now
            known.vital = vital
            self._remind_of(vital.member, known)
        return tuple(dead)

    def _remind_of(self, member: int, rank: _Rank) -> None:
        if rank.stopped_at is not None:
            self._look_at_ranks.by(rank.stopped_at + self.detection_s, member)
        if _can_hang(rank.vital):
            self._look_at_ranks.by(rank.moved_at + self._hung_limit_s(rank.vital), member)

    def node_ended(self, node: str, now: float) -> Verdict:
        """All connections to a node's processes were closed by its kernel."""
        heard = self.nodes.get(node, now)
        self.forget_node(node)
        return Verdict(what="node", node=node, why="all its processes have ended", silent_s=max(0.0, now - heard))

    def forget_node(self, node: str) -> None:
        self.nodes.pop(node, None)
        for member in self._members.pop(node, ()):
            self.forget_rank(member)

    def forget_rank(self, member: int) -> None:
        self.ranks.pop(member, None)

    def verdicts(self, now: float) -> tuple[Verdict, ...]:
        """To be asked often; a gap between two calls is taken off everybody's silence."""
        self._excuse(now)
        found = self._silent_nodes(now)
        for verdict in found:
            self.forget_node(verdict.node)
        for member in self._look_at_ranks.due(now):
            rank = self.ranks.get(member)
            if rank is None:
                continue
            if (verdict_on_rank := self._verdict(member, rank, now)) is None:
                self._remind_of(member, rank)
            else:
                found.append(verdict_on_rank)
                self.forget_rank(member)
        return tuple(found)

    def _silent_nodes(self, now: float) -> list[Verdict]:
        why, found = "its keeper has fallen silent", []
        due = [node for node in self._look_at_nodes.due(now) if node in self.nodes]
        limit_s = self._silence_limit_s(now) if due else self.detection_s
        for node in due:
            if now - self.nodes[node] > limit_s:
                found.append(Verdict(what="node", node=node, why=why, silent_s=now - self.nodes[node]))
            else:  # it may be heard, and fall silent, at any time from now on, even if it is excused for longer
                self._look_at_nodes.by(min(self.nodes[node], now) + self.detection_s, node)
        return found

    def _silence_limit_s(self, now: float) -> float:
        """When all nodes are silent at once, it is more likely the controller that does not hear."""
        all_silent = all(now - heard > self.detection_s for heard in self.nodes.values())
        return ALL_SILENT_TIMES * self.detection_s if all_silent else self.detection_s

    def _verdict(self, member: int, rank: _Rank, now: float) -> Verdict | None:
        if rank.stopped_at is not None and now - rank.stopped_at > self.detection_s:
            why, silent_s = "the process is stopped", now - rank.stopped_at
        else:
            limit_s = self._hung_limit_s(rank.vital)
            if not _can_hang(rank.vital) or now - rank.moved_at <= limit_s:
                return None
            why, silent_s = (
                f"no progress for {now - rank.moved_at:.0f} s while computing",
                now - rank.moved_at,
            )
        return Verdict(what="rank", member=member, node=rank.node, why=why, silent_s=silent_s)

    def _hung_limit_s(self, vital: Vital) -> float:
        return max(self.hung_at_least_s, HUNG_TIMES_LONGEST * vital.longest_s)

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


def _can_hang(vital: Vital) -> bool:
    return vital.activity == "computing" and vital.work > 1
