"""Which nodes, keepers and ranks there are, as the controller is told of it: by heartbeats, and by those that stay
out; by connections that close; by the cluster's own list of nodes.

The detector gives the verdicts. What they mean for keepers is done here, what they mean for the membership is decided
by the core. All but `scan` belongs to the controller's loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from actors import launch
from actors.keeper import NotBegun, Pulse
from actors.saving import SaveNews

from .core.control import Control
from .core.detector import Detector, Verdict, Vital
from .core.events import Event, NodeGone, NodeSeen, NoNodeFits, RankGone, RankPending
from .core.occupancy import Occupancy
from .departures import Departures
from .ending import Ending
from .job import Job
from .protection import Protection
from .told import Told
from .workers import Workers

SCAN_EVERY_S = 1.0

log = logging.getLogger("resilient.controller")


@dataclass(frozen=True, slots=True)
class Beat:
    """A keeper's heartbeat."""

    node: str
    incarnation: int
    pulses: tuple[Pulse, ...]
    vault: tuple[str, int] | None
    saved: SaveNews | None


@dataclass(frozen=True, slots=True)
class LifelineLost:
    name: str


@dataclass(frozen=True, slots=True)
class Nodes:
    """As the cluster lists them."""

    capacities: dict[str, int]
    """How many ranks each could hold, if nobody else used it."""
    free: dict[str, int]
    """For how many more there is a place now."""
    gone: set[str]
    draining: dict[str, float]
    lacking: str = ""
    """What no node has, of what a rank needs."""


@dataclass(slots=True, kw_only=True)
class Presence:
    job: Job
    control: Control
    detector: Detector
    workers: Workers
    departures: Departures
    protection: Protection
    ending: Ending
    told: Told
    handle: Callable[[Event], None]
    """Takes in what follows, in the caller's thread."""
    occupancy: Occupancy
    nodes_alive: set[str] = field(default_factory=set)
    """As the cluster lists them, which may be late."""
    _unfit: dict[str, str] = field(default_factory=dict)
    """Nodes on which no keeper could begin, and why."""
    _lacking: str = ""
    """What no node has, of what a rank needs."""

    def beaten(self, node: str, pulses: tuple[Pulse, ...], now: float) -> None:
        self.workers.heard(node)
        self.workers.shown(node, pulses, self.control.membership.is_gone)
        self.occupancy.shown(node, {pulse.member for pulse in pulses if pulse.alive})
        for pulse in pulses:
            if not pulse.alive:
                self.occupancy.ended(pulse.member, node)
        vitals = tuple(
            Vital(
                member=pulse.member,
                alive=pulse.alive,
                stopped=pulse.stopped,
                activity=pulse.activity,  # type: ignore[arg-type]
                work=pulse.work,
                longest_s=pulse.longest_s,
            )
            for pulse in pulses
        )
        for verdict in self.detector.beat(node, vitals, now):
            self._judge(verdict)

    def could_not_begin(self, keeper: NotBegun) -> None:
        """That node is left alone. If there is no other, the run ends: what a keeper needs it is the user who gives."""
        if not self.workers.is_present(keeper.node, keeper.incarnation):
            return
        self._unfit[keeper.node] = keeper.why
        why = f"the keeper of node {keeper.node[:8]} could not begin: {keeper.why}"
        self.told.say(why)
        if self.nodes_alive <= self._unfit.keys() and not self.control.membership.alive():
            self.handle(NoNodeFits(why=f"{why}; so it is on every node ({len(self._unfit)})", hopeless=True))

    def look_around(self, now: float) -> None:
        """What follows from time alone."""
        for node in self.workers.lonely(now):
            self._replace_keeper(node, now)
        for verdict in self.detector.verdicts(now):
            self._judge(verdict)

    def lost(self, name: str, now: float) -> None:
        """The lifeline of this name has closed."""
        living = [found.number for found in self.control.membership.on_node(name.split()[2])]
        node = self.workers.lifeline_closed(name, living, now)
        if node is not None:
            self._judge(self.detector.node_ended(node, now))

    def _judge(self, verdict: Verdict) -> None:
        if verdict.what == "node":
            self.workers.forget_node(verdict.node)
            self.occupancy.node_gone(verdict.node)
            self.ending.not_saving(verdict.node)
            self.protection.forget(verdict.node)
            self.handle(NodeGone(node=verdict.node, why=verdict.why, silent_s=verdict.silent_s))
        else:
            self.handle(RankGone(member=verdict.member, why=verdict.why, silent_s=verdict.silent_s))

    def _replace_keeper(self, node: str, now: float) -> None:
        self.workers.forget_keeper(node)
        self.told.say(f"the keeper of node {node[:8]} has ended while its ranks live; another takes its place")
        self.detector.excuse(node, now + self.job.settings.lease_s)
        self.workers.start_keeper(node)
        self.departures.replaced(node)

    # The cluster's list

    def scan(self, put: Callable[[Nodes], None]) -> None:
        """Which nodes there are, told again and again until the run ends; in a thread of its own."""
        known: set[str] = set()
        while self.ending.outcome is None:
            try:
                now = launch.capacities(dict(self.job.settings.resources))
                lacking = launch.lacking(dict(self.job.settings.resources)) if not any(now.values()) else ""
                free = launch.free_now(dict(self.job.settings.resources))
                put(Nodes(now, free, known - set(now), launch.draining(), lacking))
                known = set(now)
            except Exception:  # the cluster's head may be away for a while; asked again
                log.warning("could not list the cluster's nodes", exc_info=True)
            time.sleep(SCAN_EVERY_S)

    def listed(self, nodes: Nodes, now: float) -> None:
        """Starts a keeper on each new node."""
        if self.ending.outcome is not None:
            return
        capacities, gone = nodes.capacities, nodes.gone
        lacking = nodes.lacking or _in_use(capacities, nodes.free)
        if lacking != self._lacking:
            self._lacking = lacking
            self.handle(NoNodeFits(why=lacking))
        withdrawn = self.occupancy.withdrawn(nodes.free, now)
        drained = self.control.leaving.drained
        self.nodes_alive = {node for node, capacity in capacities.items() if capacity > 0 and node not in drained}
        for node in sorted(gone):
            self._judge(Verdict(what="node", node=node, why="the cluster lists it as dead", silent_s=0.0))
            self.detector.forget_node(node)
        for node, capacity in sorted(capacities.items()):
            if capacity == 0 and node not in self.workers.keepers:
                continue
            if node not in self.control.membership.leaving:
                self.workers.start_keeper(node)
            room = self.occupancy.room(node, capacity, nodes.free.get(node, capacity))
            if self.control.membership.nodes.get(node) != room and node in self.detector.nodes:
                self.handle(NodeSeen(node=node, capacity=room))
        for member, node in withdrawn:
            self.handle(RankPending(member=member, why=f"node {node[:8]} has no place for it: other jobs use it"))


def _in_use(capacities: dict[str, int], free: dict[str, int]) -> str:
    """Why there is no place for another rank, where nodes are large enough."""
    if not any(capacities.values()) or any(free.get(node, 1) for node, capacity in capacities.items() if capacity):
        return ""
    return "all that nodes have for its ranks is in use, by this or by other jobs"
