"""The controller: the only loop around the core. Facts go in as events, instructions are carried out.

It runs as a detached actor that Ray restarts; what it must remember is in the cluster's keys (plans,
ranks started) and in the ranks' repeated reports. Training needs it only when membership changes.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from actors import launch
from actors.keeper import KeeperAnswer, Pulse
from actors.lease import Lease
from actors.lifeline import Lifelines
from actors.notice import LeaveAsked
from actors.priority import raise_priority
from actors.remark import Remark
from actors.saving import SaveNews

from .checkpoints import look
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
    SnapshotProtected,
    StopAsked,
    Tick,
)
from .core.instructions import (
    CreateGeneration,
    DecodeImages,
    End,
    Instruction,
    Kill,
    LetGo,
    LookAtStorage,
    Say,
    SendPlan,
    Spawn,
    TakeInventory,
)
from .core.plan import Plan
from .departures import Departures, drain
from .errands import Done, Errands
from .job import Job
from .ledger import Ledger
from .protection import Protection
from .records import Known, ReturnValue, StepValues
from .told import Told
from .workers import Workers

TICK_S = 0.05
SCAN_EVERY_S = 1.0
RENEW_EVERY_S = 1.0
OUTCOME_KEPT_S = 60.0
FINISH_LIMIT_S = 1800.0
"""How long the end of a run waits for its last checkpoint, on storage that may have stalled."""
DRIVER_GONE = "the driver has gone"
ANSWER_LIMIT_DETECTIONS = 5
"""How long keepers may take to check what they hold, or to decode, before the others' answers must do."""

log = logging.getLogger("resilient.controller")


@dataclass(frozen=True, slots=True)
class _Beat:
    node: str
    incarnation: int
    pulses: tuple[Pulse, ...]
    vault: tuple[str, int] | None
    saved: SaveNews | None


@dataclass(frozen=True, slots=True)
class _LifelineLost:
    name: str


@dataclass(frozen=True, slots=True)
class _Nodes:
    capacities: dict[str, int]
    gone: set[str]
    draining: dict[str, float]


class Controller:
    """Actor. Its methods only take in facts or hand out what is known; all decisions are the core's."""

    def __init__(self, job: Job) -> None:
        raise_priority()
        self._job = job
        settings = job.settings
        self._control = Control(
            limits=settings.limits,
            allow_different_bits=settings.allow_different_bits,
            attempt=job.attempt,
            resume=settings.checkpoint.resume if settings.checkpoint else "auto",
        )
        self._detector = Detector(detection_s=settings.detection_s)
        self._told = Told(job=job, control=self._control)
        self._outcome: End | None = None
        self._ended_at = 0.0
        self._lock = threading.Lock()
        """Held while a fact is taken in, and while what is known is read."""
        self._events: queue.Queue[Any] = queue.Queue()
        self._driver = Lease(settings.driver_lease_s)
        self._me = ray.get_runtime_context().current_actor
        self._ledger = Ledger(job)
        self._errands = Errands(self._events.put)
        self._workers = Workers(job, self._me, self._errands)
        self._finishing: End | None = None
        """What the run ends with, once its last checkpoint is durable."""
        self._finishing_since = 0.0
        self._still_saving: dict[str, int] = {}
        """Nodes that have not said that they are done, with the keepers' incarnations that were asked."""
        saves = settings.checkpoint is not None
        self._departures = Departures(
            self._ledger, self._workers, self._errands, saves=saves, put=self._events.put, forget=self._forget_keeper
        )
        self._protection = Protection(settings.snapshot.parity if settings.snapshot else 0)
        self._answer_limit_s = ANSWER_LIMIT_DETECTIONS * settings.detection_s
        self._lifelines = Lifelines(ray.util.get_node_ip_address(), job.secret, self._lifeline_lost)
        self._renewed_at = 0.0
        self._looked_at = 0.0
        self._nodes_alive: set[str] = set()
        """As the cluster lists them, which may be late."""
        self._resume()
        threading.Thread(target=self._scan, name="scan", daemon=True).start()
        threading.Thread(target=self._loop, name="loop", daemon=True).start()

    # Called by ranks and keepers

    def hear(self, messages: tuple[object, ...]) -> None:
        for message in messages:
            self._events.put(message)

    def beat(
        self,
        node: str,
        incarnation: int,
        pulses: tuple[Pulse, ...],
        vault: tuple[str, int] | None = None,
        saved: SaveNews | None = None,
    ) -> None:
        self._events.put(_Beat(node, incarnation, pulses, vault, saved))

    # Called by the driver

    def renew(self) -> None:
        self._driver.renew()

    def poll(self, fetched: int, known: Known) -> dict[str, Any]:
        """What is new: `fetched` is the last step whose row of metrics the driver has, `known` what came with the last
        answer that it has heard."""
        self._driver.renew()
        with self._lock:
            return self._told.news(self._outcome, fetched, known)

    def look(self) -> dict[str, Any]:
        """All that is known, without a say in anything."""
        with self._lock:
            return self._told.look(self._outcome, self._detector)

    def drain(self, node: str) -> None:
        """The ranks on this node leave it, and then its keeper. Shown by `look`."""
        self._events.put(drain(node))

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
        with self._lock:
            return self._told.processes()

    # The loop

    def _loop(self) -> None:
        while True:
            try:
                fact = self._events.get(timeout=TICK_S)
            except queue.Empty:
                fact = None
            try:
                with self._lock:
                    if fact is not None:
                        self._take_in(fact)
                    self._look_around(time.monotonic())
            except Exception as error:  # the process's edge: the controller must say why it can't go on
                log.exception("the controller failed")
                self._carry_out(End(outcome="failed", reason=f"the controller failed: {error!r} on {fact!r}"))

    def _take_in(self, fact: Any) -> None:
        now = time.monotonic()
        match fact:
            case StepValues() | Remark() | ReturnValue():
                self._told.take(fact)
                if (generation := self._told.protected_generation) > self._control.leaving.protected:
                    self._handle(SnapshotProtected(generation=generation))
            case LeaveAsked():
                self._departures.asked(fact)
            case _Beat(node=node, incarnation=incarnation, pulses=pulses, vault=vault, saved=saved):
                if saved is not None:
                    self._save_news(f"{node}/{incarnation}", saved)
                if self._workers.is_present(node, incarnation):
                    self._protection.heard(node, vault, self._workers.keepers)
                    self._beaten(node, pulses, now)
            case KeeperAnswer():
                self._answered(fact)
            case _LifelineLost(name=name):
                self._lost(name, now)
            case _Nodes():
                for event in self._departures.noticed(fact.draining):
                    self._handle(event)
                self._nodes(fact.capacities, fact.gone)
            case Done():
                fact.finish()
            case _:
                self._handle(fact)

    def _save_news(self, keeper: str, news: SaveNews) -> None:
        said = self._told.saved.heard(keeper, news)
        for text in said:
            self._told.say(text)
        if said:
            self._errands.run(lambda: self._ledger.has_said(keeper, news))

    def _answered(self, answer: KeeperAnswer) -> None:
        if answer.phase == "saved":
            self._still_saving.pop(answer.node, None)
            self._departures.saved(answer.node)
            return
        if answer.error:
            self._told.say(f"keeper of node {answer.node[:8]}: {answer.error}")
        self._protection.answered(answer)

    def _look_around(self, now: float) -> None:
        """What follows from time alone: a few times a second, however many facts arrive."""
        if (outcome := self._protection.settle(self._workers.keepers, now, self._answer_limit_s)) is not None:
            self._handle(outcome)
        if now - self._looked_at < TICK_S:
            return
        self._looked_at = now
        self._handle(Tick())
        for node in self._workers.lonely(now):
            self._replace_keeper(node, now)
        for verdict in self._detector.verdicts(now):
            self._judge(verdict)
        if now - self._renewed_at > RENEW_EVERY_S:
            self._renewed_at = now
            self._renew()
            if (remark := self._errands.remark(self._job.settings.detection_s)) is not None:
                self._told.say(remark)
            if self._finishing is not None and self._outcome is None:
                self._finish_saving()

    def _handle(self, event: Event) -> None:
        for instruction in self._control.handle(event, time.monotonic()):
            self._carry_out(instruction)

    def _beaten(self, node: str, pulses: tuple[Pulse, ...], now: float) -> None:
        self._workers.heard(node)
        self._workers.shown(node, pulses, self._control.membership.is_gone)
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
            self._workers.forget_node(verdict.node)
            self._still_saving.pop(verdict.node, None)
            self._protection.forget(verdict.node)
            self._handle(NodeGone(node=verdict.node, why=verdict.why, silent_s=verdict.silent_s))
        else:
            self._handle(RankGone(member=verdict.member, why=verdict.why, silent_s=verdict.silent_s))

    def _lost(self, name: str, now: float) -> None:
        living = [found.number for found in self._control.membership.on_node(name.split()[2])]
        node = self._workers.lifeline_closed(name, living, now)
        if node is not None:
            self._judge(self._detector.node_ended(node, now))

    def _replace_keeper(self, node: str, now: float) -> None:
        self._workers.forget_keeper(node)
        self._told.say(f"the keeper of node {node[:8]} has ended while its ranks live; another takes its place")
        self._detector.excuse(node, now + self._job.settings.lease_s)
        self._workers.start_keeper(node)
        self._departures.replaced(node)

    def _forget_keeper(self, node: str) -> None:
        self._detector.forget_node(node)
        self._protection.forget(node)

    def _lifeline_lost(self, name: str) -> None:
        self._events.put(_LifelineLost(name))

    # Instructions

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Spawn(member=member, node=node):
                taken = End(outcome="superseded", reason=f"member {member} was started by another controller")
                self._workers.spawn(member, node, lambda: self._end(taken), self._control.membership.is_gone)
            case Kill(member=member, node=node, reason=reason, released=released):
                self._told.say(f"member {member} on node {node[:8]} {'has left' if released else 'is gone'}: {reason}")
                self._detector.forget_rank(member)
                self._workers.kill(member, node)
            case LetGo(node=node):
                self._departures.let_go(node)
            case CreateGeneration(plan=plan):
                self._create(plan)
            case TakeInventory() | DecodeImages():
                self._ask_keepers(instruction)
            case LookAtStorage(asked=asked):
                assert self._job.settings.checkpoint is not None
                look(self._job.settings.checkpoint, asked, self._events.put)
            case SendPlan(member=member, plan=plan):
                if member in self._workers.ranks:
                    self._workers.ranks[member].deliver.remote(plan)
            case Say(text=text):
                self._told.say(text)
            case End():
                self._end(instruction)

    def _create(self, plan: Plan) -> None:
        self._told.say(f"generation {plan.generation}: {plan.size} ranks, {plan.reason}")

        creator = launch.new_creator()

        def create() -> tuple[bool, dict[str, str]]:
            return self._ledger.create(plan, creator), launch.domains() if self._job.settings.snapshot else {}

        self._errands.run(create, lambda done: self._created(plan, *done))

    def _created(self, plan: Plan, created: bool, domains: dict[str, str]) -> None:
        if not created:
            self._handle(GenerationTaken(generation=plan.generation))
            return
        if plan.restore is not None:
            of_earlier_attempt = plan.restore.key.attempt != self._job.attempt
            self._told.records.rewind(plan.generation, plan.restore.key.step, plan.branch, anew=of_earlier_attempt)
        self._protect(plan, domains)
        self._handle(GenerationCreated(generation=plan.generation))

    def _protect(self, plan: Plan, domains: dict[str, str]) -> None:
        if self._job.settings.snapshot is not None:
            self._protection.planned(plan, domains, self._workers.keepers)

    def _ask_keepers(self, instruction: TakeInventory | DecodeImages) -> None:
        keepers, now, limit_s = self._workers.keepers, time.monotonic(), self._answer_limit_s
        if isinstance(instruction, TakeInventory):
            asked, ended = instruction.asked, instruction.ended
            self._protection.take_inventory(asked, ended, keepers, self._nodes_alive, now + limit_s)
        else:
            self._told.say(f"going back to {instruction.elected.reason}")
            self._protection.rebuild(instruction.asked, instruction.elected, keepers, now, limit_s)

    def _end(self, end: End) -> None:
        if end.outcome == "finished" and self._job.settings.checkpoint is not None and self._finishing is None:
            self._finishing, self._finishing_since = end, time.monotonic()
            self._still_saving = dict.fromkeys(self._workers.keepers, 0)
            self._finish_saving()
        else:
            self._conclude(end)

    def _finish_saving(self) -> None:
        """The final state's checkpoint is waited for; a keeper that was replaced meanwhile is asked again."""
        assert self._finishing is not None
        for node in self._still_saving:
            if node in self._workers.keepers and self._still_saving[node] != self._workers.incarnation(node):
                self._still_saving[node] = self._workers.incarnation(node)
                self._workers.keepers[node].finish_saving.remote()
        late = time.monotonic() - self._finishing_since > FINISH_LIMIT_S
        if late:
            self._told.say(f"the last checkpoint is given up: not written within {FINISH_LIMIT_S:.0f} s")
        if late or not self._still_saving or self._driver.expired():
            self._conclude(self._finishing)

    def _conclude(self, end: End) -> None:
        if self._outcome is not None:
            return
        self._outcome = end
        self._control.ended = True  # the core does not know of an end that was found here: it decides nothing more
        self._ended_at = time.monotonic()
        threading.Thread(target=self._clean_up, name="clean-up", daemon=True).start()

    def _clean_up(self) -> None:
        """Leave no process, file or key behind, then end; the outcome waits for the driver a while."""
        superseded = self._outcome is not None and self._outcome.outcome == "superseded"
        lingers = self._lingers()
        if not superseded:
            self._workers.end(linger=lingers)
        while time.monotonic() - self._ended_at < OUTCOME_KEPT_S and not self._driver.expired():
            time.sleep(TICK_S)
        self._errands.run(
            lambda: self._leave(None if superseded else lingers)
        )  # after whatever is still to be recorded

    def _leave(self, keep_lineage: bool | None) -> None:
        try:
            if keep_lineage is not None:
                self._ledger.close(keep_lineage=keep_lineage)
        finally:
            launch.end(self._me)

    def _lingers(self) -> bool:
        """Whether the run may be submitted again and go on from memory: it has neither finished, nor did its
        driver end it."""
        snapshot, outcome = self._job.settings.snapshot, self._outcome
        if snapshot is None or outcome is None or snapshot.linger_s == 0:
            return False
        return outcome.outcome == "failed" or (outcome.outcome == "stopped" and outcome.reason == DRIVER_GONE)

    # Nodes, leases, restart

    def _scan(self) -> None:
        """Which nodes there are; starts a keeper on each new one."""
        known: set[str] = set()
        while self._outcome is None:
            try:
                now = launch.capacities(dict(self._job.settings.resources))
                self._events.put(_Nodes(now, known - set(now), launch.draining()))
                known = set(now)
            except Exception:  # the cluster's head may be away for a while; asked again
                log.warning("could not list the cluster's nodes", exc_info=True)
            time.sleep(SCAN_EVERY_S)

    def _nodes(self, capacities: dict[str, int], gone: set[str]) -> None:
        if self._outcome is not None:
            return
        drained = self._control.leaving.drained
        self._nodes_alive = {node for node, capacity in capacities.items() if capacity > 0 and node not in drained}
        for node in sorted(gone):
            self._judge(Verdict(what="node", node=node, why="the cluster lists it as dead", silent_s=0.0))
            self._detector.forget_node(node)
        for node, capacity in sorted(capacities.items()):
            if capacity == 0 and node not in self._workers.keepers:
                continue
            if node not in self._control.membership.leaving:
                self._workers.start_keeper(node)
            news = self._control.membership.nodes.get(node) != capacity
            if news and node in self._detector.nodes:
                self._handle(NodeSeen(node=node, capacity=capacity))

    def _renew(self) -> None:
        if self._outcome is not None:
            return
        if self._driver.expired():
            self._handle(StopAsked(why=DRIVER_GONE))
            return
        self._workers.renew(self._lifelines.address, self._told.records.fetched)
        self._protection.tell(self._workers.keepers)

    def _resume(self) -> None:
        """After a restart: learn what is on record, and which of the processes on record still live."""
        if self._ledger.begin():
            if (lineage := self._ledger.lineage()) is not None:
                self._control.restoring.lineage, self._control.going_back.lineage_known = lineage, True
            return
        plans, (spawned, gone) = self._ledger.plans(), self._workers.find()
        self._events.put(Resumed(plans=plans, spawned=tuple(sorted(spawned.items())), gone=tuple(sorted(gone))))
        for event in self._departures.on_record():
            self._events.put(event)
        self._told.records.resume(plans)
        self._told.saved.news = self._ledger.said()
        if plans:
            self._protect(plans[-1], launch.domains())
        for node in sorted({*spawned.values(), *self._workers.keepers}):
            self._detector.expect(node, time.monotonic())
        for member in sorted(gone | set(spawned) - set(self._workers.ranks)):
            self._events.put(RankGone(member=member, why="it was gone when the controller came back"))
        self._told.say("the controller was restarted and has taken up where it was")
