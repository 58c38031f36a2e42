"""The controller: the only loop around the core. Facts go in as events, instructions are carried out.

It runs as a detached actor that Ray restarts; what it must remember is in the cluster's keys (plans,
ranks started) and in the ranks' repeated reports. Training needs it only when membership changes.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import ray

from actors import launch
from actors.keeper import KeeperSpec, Pulse
from actors.lease import Lease
from actors.lifeline import Lifelines
from actors.priority import raise_priority
from actors.rank import RankSpec

from .core.control import Control
from .core.detector import Detector, Verdict, Vital
from .core.events import (
    Event,
    GenerationCreated,
    GenerationTaken,
    NodeGone,
    NodeSeen,
    RankGone,
    Resumed,
    StopAsked,
    Tick,
)
from .core.instructions import CreateGeneration, End, Instruction, Kill, Say, SendPlan, Spawn
from .core.plan import Plan
from .job import Job
from .records import Records, ReturnValue, StepValues
from .worker import RankBody

TICK_S = 0.05
SCAN_EVERY_S = 1.0
RENEW_EVERY_S = 1.0
OUTCOME_KEPT_S = 60.0

log = logging.getLogger("resilient.controller")


@dataclass(frozen=True, slots=True)
class _LifelineLost:
    name: str


@dataclass(frozen=True, slots=True)
class _Nodes:
    capacities: dict[str, int]
    gone: set[str]
    incarnation: int


class Controller:
    """Actor. Its methods only take in facts or hand out what is known; all decisions are the core's."""

    def __init__(self, job: Job) -> None:
        raise_priority()
        self._job = job
        settings = job.settings
        self._control = Control(limits=settings.limits, allow_different_bits=settings.allow_different_bits)
        self._detector = Detector(detection_s=settings.detection_s)
        self._records = Records()
        self._values: dict[int, bytes] = {}
        self._messages: list[str] = []
        self._outcome: End | None = None
        self._ended_at = 0.0
        self._lock = threading.Lock()
        """Held while a fact is taken in, and while what is known is read."""
        self._events: queue.Queue[Any] = queue.Queue()
        self._ranks: dict[int, Any] = {}
        self._keepers: dict[str, Any] = {}
        self._lost_lines: dict[str, set[tuple[str, int]]] = {}
        """Closed lifelines by node."""
        self._driver = Lease(settings.driver_lease_s)
        self._me = ray.get_runtime_context().current_actor
        self._lifelines = Lifelines(ray.util.get_node_ip_address(), job.secret, self._lifeline_lost)
        self._renewed_at = 0.0
        self._resume()
        threading.Thread(target=self._scan, name="scan", daemon=True).start()
        threading.Thread(target=self._loop, name="loop", daemon=True).start()

    # Called by ranks and keepers

    def hear(self, messages: tuple[object, ...]) -> None:
        for message in messages:
            self._events.put(message)

    def beat(self, node: str, pulses: tuple[Pulse, ...], sent_at: float) -> None:
        self._events.put((node, pulses))

    # Called by the driver

    def renew(self) -> None:
        self._driver.renew()

    def poll(self, fetched: int, known: tuple[int, int]) -> dict[str, Any]:
        """What is new: `fetched` is the last step whose row of metrics the driver has, `known` the process
        id of the controller it last heard, with the number of recoveries it has from it."""
        self._driver.renew()
        with self._lock:
            return self._news(fetched, known[1] if known[0] == os.getpid() else 0)

    def _news(self, fetched: int, known: int) -> dict[str, Any]:
        chronicle = self._control.chronicle
        current = self._control.current
        return {
            "rows": self._records.after(fetched, all_of_them=self._outcome is not None),
            "step": self._records.newest + 1,
            "generation": current.generation if current else 0,
            "ranks": self._control.formed.size if self._control.formed else 0,
            "recoveries": [{**asdict(item), "total_s": item.total_s} for item in chronicle.recoveries[known:]],
            "known": (os.getpid(), len(chronicle.recoveries)),
            "messages": list(self._messages),
            "outcome": None if self._outcome is None else asdict(self._outcome),
            "value": self._return_value() if self._outcome is not None else None,
        }

    def stop(self, why: str) -> None:
        self._events.put(StopAsked(why=why))

    def close(self) -> None:
        """The driver has the outcome."""
        self._ended_at = -OUTCOME_KEPT_S

    def driver_lives(self) -> bool:
        return not self._driver.expired()

    def process(self) -> int:
        return os.getpid()

    def processes(self) -> dict[str, Any]:
        """Live processes by rank, for tests and chaos: member, node and Ray actor of each."""
        with self._lock:
            return self._processes()

    def _processes(self) -> dict[str, Any]:
        current = self._control.current
        members = current.members if current else ()
        alive = {member.number: member.node for member in self._control.membership.alive()}
        return {
            "generation": current.generation if current else 0,
            "formed": self._control.formed.generation if self._control.formed else 0,
            "step": self._records.newest + 1,
            "ranks": [(number, alive[number]) for number in members if number in alive],
            "others": sorted(set(alive) - set(members)),
        }

    # The loop

    def _loop(self) -> None:
        while True:
            try:
                fact = self._events.get(timeout=TICK_S)
            except queue.Empty:
                fact = Tick()
            try:
                with self._lock:
                    self._take_in(fact)
            except Exception as error:  # the process's edge: the controller must say why it can't go on
                log.exception("the controller failed")
                self._carry_out(End(outcome="failed", reason=f"the controller failed: {error!r} on {fact!r}"))

    def _take_in(self, fact: Any) -> None:
        now = time.monotonic()
        match fact:
            case StepValues():
                self._records.add(fact)
            case ReturnValue(member=member, value=value):
                self._values[member] = value
            case (str() as node, tuple() as pulses):
                self._beaten(node, pulses, now)
            case _LifelineLost(name=name):
                self._lost(name, now)
            case _Nodes(capacities=capacities, gone=gone, incarnation=incarnation):
                self._nodes(capacities, gone, incarnation)
            case _:
                self._handle(fact)
        for verdict in self._detector.verdicts(now):
            self._judge(verdict)
        if now - self._renewed_at > RENEW_EVERY_S:
            self._renewed_at = now
            self._renew()

    def _handle(self, event: Event) -> None:
        for instruction in self._control.handle(event, time.monotonic()):
            self._carry_out(instruction)

    def _beaten(self, node: str, pulses: tuple[Pulse, ...], now: float) -> None:
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
        for verdict in self._detector.beat(node, vitals, now):
            self._judge(verdict)

    def _judge(self, verdict: Verdict) -> None:
        if verdict.what == "node":
            keeper = self._keepers.pop(verdict.node, None)
            if keeper is not None:
                launch.end(keeper)
            self._handle(NodeGone(node=verdict.node, why=verdict.why, silent_s=verdict.silent_s))
        else:
            self._handle(RankGone(member=verdict.member, why=verdict.why, silent_s=verdict.silent_s))

    def _lost(self, name: str, now: float) -> None:
        """A node is dead at once when its keeper's and all its ranks' connections have been closed."""
        kind, member, node = name.split()
        self._lost_lines.setdefault(node, set()).add((kind, int(member)))
        lost = self._lost_lines[node]
        ranks = {("rank", found.number) for found in self._control.membership.on_node(node)}
        if ("keeper", 0) in lost and ranks <= lost and node in self._keepers:
            del self._lost_lines[node]
            self._judge(self._detector.node_ended(node, now))

    def _lifeline_lost(self, name: str) -> None:
        self._events.put(_LifelineLost(name))

    # Instructions

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Spawn(member=member, node=node):
                self._spawn(member, node)
            case Kill(member=member, node=node, reason=reason):
                self._kill(member, node, reason)
            case CreateGeneration(plan=plan):
                key = f"{self._job.key}/generation/{plan.generation:09d}"
                created = launch.create_key(key, plan.to_json().encode())
                self._say(f"generation {plan.generation}: {plan.size} ranks, {plan.reason}")
                outcome = GenerationCreated if created else GenerationTaken
                self._handle(outcome(generation=plan.generation))
            case SendPlan(member=member, plan=plan):
                if member in self._ranks:
                    self._ranks[member].deliver.remote(plan)
            case Say(text=text):
                self._say(text)
            case End():
                self._end(instruction)

    def _spawn(self, member: int, node: str) -> None:
        settings = self._job.settings
        if not launch.create_key(f"{self._job.key}/rank/{member:09d}", node.encode()):
            self._end(End(outcome="superseded", reason=f"member {member} was started by another controller"))
            return
        spec = RankSpec(
            key=self._job.key,
            member=member,
            node=node,
            folder=launch.folder_of(self._job.key, node),
            secret=self._job.secret,
            lease_s=settings.lease_s,
        )
        self._ranks[member] = launch.start_rank(
            spec,
            resources=dict(settings.resources),
            controller=self._me,
            keeper=self._keepers[node],
            make_body=functools.partial(RankBody, self._job),
        )

    def _kill(self, member: int, node: str, reason: str) -> None:
        self._say(f"member {member} on node {node[:8]} is gone: {reason}")
        self._detector.forget_rank(member)
        if node in self._keepers:
            self._keepers[node].kill.remote(member)
        if member in self._ranks:
            launch.end(self._ranks.pop(member))

    def _end(self, end: End) -> None:
        if self._outcome is not None:
            return
        self._outcome = end
        self._ended_at = time.monotonic()
        threading.Thread(target=self._clean_up, name="clean-up", daemon=True).start()

    def _clean_up(self) -> None:
        """Leave no process, file or key behind, then end; the outcome waits for the driver a while."""
        superseded = self._outcome is not None and self._outcome.outcome == "superseded"
        if not superseded:
            for handle in self._ranks.values():
                launch.end(handle)
            cleaning = [keeper.clean_up.remote() for keeper in self._keepers.values()]
            ray.wait(cleaning, num_returns=len(cleaning), timeout=self._job.settings.detection_s) if cleaning else None
            for handle in self._keepers.values():
                launch.end(handle)
        while time.monotonic() - self._ended_at < OUTCOME_KEPT_S and not self._driver.expired():
            time.sleep(TICK_S)
        if not superseded:
            launch.delete_keys(f"{self._job.key}/")
        launch.end(self._me)

    def _say(self, text: str) -> None:
        log.info(text)
        self._messages.append(f"{time.strftime('%H:%M:%S')} {text}")
        del self._messages[:-200]

    # Nodes, leases, restart

    def _scan(self) -> None:
        """Which nodes there are; starts a keeper on each new one."""
        known: set[str] = set()
        incarnation = int(time.time())
        while self._outcome is None:
            try:
                now = launch.capacities(dict(self._job.settings.resources))
                self._events.put(_Nodes(now, known - set(now), incarnation))
                known = set(now)
            except Exception:  # the cluster's head may be away for a while; asked again
                log.warning("could not list the cluster's nodes", exc_info=True)
            time.sleep(SCAN_EVERY_S)

    def _nodes(self, capacities: dict[str, int], gone: set[str], incarnation: int) -> None:
        for node in sorted(gone):
            self._judge(Verdict(what="node", node=node, why="the cluster lists it as dead", silent_s=0.0))
            self._detector.forget_node(node)
        for node, capacity in sorted(capacities.items()):
            if capacity == 0 and node not in self._keepers:
                continue
            if node not in self._keepers:
                self._start_keeper(node, incarnation)
            if node in self._detector.nodes:
                self._handle(NodeSeen(node=node, capacity=capacity))

    def _start_keeper(self, node: str, incarnation: int) -> None:
        settings = self._job.settings
        spec = KeeperSpec(
            key=self._job.key,
            node=node,
            folder=launch.folder_of(self._job.key, node),
            secret=self._job.secret,
            beat_s=settings.detection_s / 8,
            lease_s=settings.lease_s,
        )
        self._lost_lines.pop(node, None)
        number = incarnation * 1000 + int(time.monotonic() * 1000) % 1000
        self._keepers[node] = launch.start_keeper(spec, incarnation=number, controller=self._me)

    def _renew(self) -> None:
        if self._outcome is not None:
            return
        if self._driver.expired():
            self._handle(StopAsked(why="the driver has gone"))
            return
        address, acknowledged = self._lifelines.address, self._records.fetched
        for rank in self._ranks.values():
            rank.renew.remote(address, acknowledged)
        for keeper in self._keepers.values():
            keeper.renew.remote(address)

    def _resume(self) -> None:
        """After a restart: learn what is on record, and which of the processes on record still live."""
        if launch.create_key(f"{self._job.key}/began", b""):
            return
        prefix = f"{self._job.key}/"
        plans = [launch.read_key(key) for key in launch.list_keys(f"{prefix}generation/")]
        spawned = {
            int(key.rpartition("/")[2]): (launch.read_key(key) or b"").decode()
            for key in launch.list_keys(f"{prefix}rank/")
        }
        live = set(launch.names(prefix))
        for name in sorted(live):
            kind, _, rest = name.removeprefix(prefix).partition("/")
            handle = launch.find(name)
            if kind == "keeper" and handle is not None:
                self._keepers[rest.partition("/")[0]] = handle
            elif kind == "rank" and handle is not None:
                self._ranks[int(rest)] = handle
        self._events.put(
            Resumed(
                plans=tuple(Plan.from_json(text.decode()) for text in plans if text is not None),
                spawned=tuple(sorted(spawned.items())),
            )
        )
        for node in sorted({*spawned.values(), *self._keepers}):
            self._detector.expect(node, time.monotonic())
        for member in sorted(set(spawned) - set(self._ranks)):
            self._events.put(RankGone(member=member, why="it was gone when the controller came back"))
        self._say("the controller was restarted and has taken up where it was")

    def _return_value(self) -> bytes | None:
        current = self._control.current
        members = current.members if current else ()
        return next((self._values[member] for member in members if member in self._values), None)
