"""The controller: the only loop around the core. Facts go in as events, instructions are carried out.

It runs as a detached actor that Ray restarts; what it must remember is in the cluster's keys (plans,
ranks started) and in the ranks' repeated reports. Training needs it only when membership changes.
"""

from __future__ import annotations

import copy
import logging
import os
import queue
import threading
import time
from typing import Any, get_args

import ray
import ray.util.metrics
from typing_extensions import assert_never

from actors import launch
from actors.keeper import KeeperAnswer, NotBegun, Pulse, Saved
from actors.lease import Lease
from actors.lifeline import Lifelines
from actors.notice import LeaveAsked
from actors.priority import raise_priority
from actors.remark import Remark
from actors.saving import SaveNews

from .checkpoints import look
from .core.control import Control
from .core.detector import Detector
from .core.events import (
    Event,
    GenerationCreated,
    GenerationTaken,
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
    ProbeLinks,
    Say,
    SendPlan,
    Spawn,
    TakeInventory,
)
from .core.occupancy import Occupancy
from .core.plan import Plan
from .core.story import Happening, Story
from .departures import Departures, drain
from .ending import DRIVER_GONE, END_LIMIT_S, Ending
from .errands import Done, Errands
from .job import Job
from .ledger import Ledger
from .metrics import Seen
from .notes import Notes
from .presence import Beat, LifelineLost, Nodes, Presence
from .protection import Protection
from .ray_metrics import RayMetrics
from .records import Former, Known, ReturnValue, StepValues
from .showing import Showing
from .told import Told, warn_on_stderr
from .workers import Workers

TICK_S = 0.05
RENEW_EVERY_S = 1.0
ANSWER_LIMIT_DETECTIONS = 5
"""How long keepers may take to check what they hold, or to decode, before the others' answers must do."""

FACTS = (StepValues, Remark, ReturnValue, LeaveAsked, NotBegun, KeeperAnswer, Saved, *get_args(Event))
"""What ranks and keepers may tell."""

log = logging.getLogger("resilient.controller")


class Controller:
    """Actor. Its methods only take in facts or hand out what is known; all decisions are the core's."""

    def __init__(self, job: Job) -> None:
        raise_priority()
        warn_on_stderr()
        me = ray.get_runtime_context().current_actor
        self._ledger = Ledger(job)
        if self._ledger.is_closed():  # it had ended, and died while it was still shown
            launch.end(me)
            time.sleep(END_LIMIT_S)
            raise SystemExit("the attempt has ended, and its controller could not be ended")
        self._job = job
        settings = job.settings
        self._control = Control(
            limits=settings.limits,
            allow_different_bits=settings.allow_different_bits,
            attempt=job.attempt,
            resume=settings.checkpoint.resume if settings.checkpoint else "auto",
        )
        self._detector = Detector(detection_s=settings.detection_s)
        self._showing = Showing(
            job,
            ray.util.get_node_ip_address(),
            seen=self.seen,
            say=lambda text: self._events.put(Remark(text=text)),
            bound=lambda port: self._notes.serves(port),  # noqa: PLW0108  that is made later
            cluster=ray.get_runtime_context().gcs_address,
        )
        self._story = Story()
        self._told = Told(job=job, control=self._control, curve=self._showing.feed.loss, keep=self._showing.keep)
        self._lock = threading.Lock()
        """Held while a fact is taken in, and while what is known is read."""
        self._events: queue.Queue[Any] = queue.Queue()
        self._driver = Lease(settings.driver_lease_s)
        self._errands = Errands(self._events.put)
        self._notes = Notes(self._ledger, self._errands, self._told)
        self._workers = Workers(job, me, self._errands, self._never_began)
        self._ending = Ending(
            job=job,
            me=me,
            lock=self._lock,
            driver=self._driver,
            control=self._control,
            ledger=self._ledger,
            errands=self._errands,
            workers=self._workers,
            showing=self._showing,
            told=self._told,
            happened=self._happened,
        )
        saves = settings.checkpoint is not None
        self._departures = Departures(
            self._ledger, self._workers, self._errands, saves=saves, put=self._events.put, forget=self._forget_keeper
        )
        self._protection = Protection(settings.snapshot.parity if settings.snapshot else 0)
        self._occupancy = Occupancy(patience_s=settings.limits.place_s)
        self._presence = Presence(
            job=job,
            control=self._control,
            detector=self._detector,
            workers=self._workers,
            departures=self._departures,
            protection=self._protection,
            ending=self._ending,
            told=self._told,
            handle=self._handle,
            occupancy=self._occupancy,
        )
        self._answer_limit_s = ANSWER_LIMIT_DETECTIONS * settings.detection_s
        self._lifelines = Lifelines(ray.util.get_node_ip_address(), job.secret, self._lifeline_lost)
        self._renewed_at = 0.0
        self._looked_at = 0.0
        self._begin()

    def _begin(self) -> None:
        self._resume()
        self._showing.serve(self._ledger.served())
        if self._job.settings.ray_metrics:
            RayMetrics(self.seen, ray.util.metrics.Gauge).begin()
        threading.Thread(target=self._presence.scan, args=(self._events.put,), name="scan", daemon=True).start()
        threading.Thread(target=self._loop, name="loop", daemon=True).start()

    # Called by ranks and keepers

    def hear(self, messages: tuple[object, ...]) -> None:
        """What is none of the facts that are known here is refused, and said: it must not end the run."""
        for message in messages:
            known = isinstance(message, FACTS)
            self._events.put(message if known else Remark(text=f"a message was refused: {type(message).__name__}"))

    def beat(
        self,
        node: str,
        incarnation: int,
        pulses: tuple[Pulse, ...],
        vault: tuple[str, int] | None = None,
        saved: SaveNews | None = None,
    ) -> None:
        self._events.put(Beat(node, incarnation, pulses, vault, saved))

    # Called by the driver

    def renew(self) -> None:
        self._driver.renew()

    def poll(self, fetched: int, known: Known) -> dict[str, Any]:
        """What is new: `fetched` is the last step whose row of metrics the driver has, `known` what came with the last
        answer that it has heard."""
        self._driver.renew()
        with self._lock:
            return self._told.news(self._ending.outcome, fetched, known)

    def look(self) -> dict[str, Any]:
        """All that is known, without a say in anything."""
        with self._lock:
            return self._look()

    def _look(self) -> dict[str, Any]:
        return {
            **self._told.look(self._ending.outcome, self._detector),
            "protection": self._protection.view(self._workers.keepers),
            "lingers": self._ending.lingering,
            "observe": self._showing.view(),
        }

    def seen(self) -> Seen:
        """For metrics: figures and how things stand, at one moment."""
        with self._lock:
            return Seen(
                figures=copy.deepcopy(self._control.chronicle.figures),
                look=self._look(),
            )

    def shown(self) -> dict[str, Any]:
        """All that the live page shows."""
        return {"now": self._showing.feed.now(), "history": self._showing.feed.history(None)[0]}

    def drain(self, node: str) -> None:
        """The ranks on this node leave it, and then its keeper. Shown by `look`."""
        self._events.put(drain(node))

    def stop(self, why: str) -> None:
        self._events.put(StopAsked(why=why))

    def close(self) -> None:
        """The driver has the outcome."""
        self._ending.closed = True

    def lingers(self) -> bool:
        """Whether all is over, and those who scrape the run are only to see that it is."""
        return self._ending.lingering

    def gives_way(self) -> bool:
        """The same; then it ends at once: a new run needs its name or its port."""
        return self._ending.give_way()

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
            case Beat(node=node, incarnation=incarnation, pulses=pulses, vault=vault, saved=saved):
                self._save_news(node, incarnation, saved)
                if self._workers.is_present(node, incarnation):
                    self._protection.heard(node, vault, self._workers.keepers)
                    self._presence.beaten(node, pulses, now)
            case NotBegun():
                self._presence.could_not_begin(fact)
            case KeeperAnswer() | Saved():
                self._answered(fact)
            case LifelineLost(name=name):
                self._presence.lost(name, now)
            case Nodes():
                for event in self._departures.noticed(fact.draining):
                    self._handle(event)
                self._presence.listed(fact, now)
            case Done():
                fact.finish()
            case _:
                self._handle(fact)

    def _save_news(self, node: str, incarnation: int, news: SaveNews | None) -> None:
        keeper = f"{node}/{incarnation}"
        if news is not None and (happened := self._told.heard(keeper, news)):
            for happening in happened:
                self._happened(happening)
            self._notes.has_said(keeper, news)

    def _answered(self, answer: KeeperAnswer | Saved) -> None:
        if answer.error:
            self._told.say(f"keeper of node {answer.node[:8]}: {answer.error}")
        if isinstance(answer, Saved):
            self._save_news(answer.node, answer.incarnation, answer.news)
            if self._workers.is_present(answer.node, answer.incarnation):  # else the one in its place is asked
                self._ending.not_saving(answer.node)
                self._departures.saved(answer.node)
        else:
            self._protection.answered(answer)

    def _look_around(self, now: float) -> None:
        """What follows from time alone: a few times a second, however many facts arrive."""
        if self._ending.outcome is not None:
            return
        if (outcome := self._protection.settle(self._workers.keepers, now, self._answer_limit_s)) is not None:
            self._handle(outcome)
        if now - self._looked_at < TICK_S:
            return
        self._looked_at = now
        self._handle(Tick())
        self._presence.look_around(now)
        if now - self._renewed_at > RENEW_EVERY_S:
            self._renewed_at = now
            self._renew()
            if (remark := self._errands.remark(self._job.settings.detection_s)) is not None:
                self._told.say(remark)
            self._ending.look_around()

    def _handle(self, event: Event) -> None:
        instructions = self._control.handle(event, time.monotonic())
        for happening in self._story.after(event, instructions, self._control):
            self._happened(happening)
        for instruction in instructions:
            self._carry_out(instruction)

    def _happened(self, happening: Happening) -> None:
        self._showing.happened(happening, self._told.records.newest + 1)

    def _forget_keeper(self, node: str) -> None:
        self._detector.forget_node(node)
        self._protection.forget(node)

    def _lifeline_lost(self, name: str) -> None:
        self._events.put(LifelineLost(name))

    def _never_began(self, member: int) -> None:
        self._events.put(RankGone(member=member, why="Ray says that its process has ended", silent_s=0.0))

    # Instructions

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Spawn(member=member, node=node):
                self._occupancy.ordered(member, node, time.monotonic())
                taken = End(outcome="superseded", reason=f"member {member} was started by another controller")
                self._workers.spawn(member, node, lambda: self._ending.end(taken), self._control.membership.is_gone)
            case Kill(released=True):
                self._release(instruction)
            case Kill(member=member, node=node, reason=reason):
                self._kill(member, node, f"is gone: {reason}")
            case LetGo(node=node):
                self._errands.run(lambda: None, lambda _: self._departures.let_go(node))  # after those released there
            case CreateGeneration(plan=plan):
                self._create(plan)
            case TakeInventory() | DecodeImages():
                self._ask_keepers(instruction)
            case LookAtStorage(asked=asked):
                assert self._job.settings.checkpoint is not None
                look(self._job.settings.checkpoint, self._job.settings.name, asked, self._events.put)
            case SendPlan(member=member, plan=plan):
                self._workers.deliver([member], plan)
            case ProbeLinks(places=places):
                self._workers.deliver([place.member for place in places], instruction)
            case Say(text=text):
                self._told.say(text)
            case End():
                self._ending.end(instruction)
            case _:
                assert_never(instruction)

    def _kill(self, member: int, node: str, what: str) -> None:
        self._told.say(f"member {member} on node {node[:8]} {what}")
        self._detector.forget_rank(member)
        self._occupancy.ended(member, node)
        self._workers.kill(member, node)

    def _release(self, kill: Kill) -> None:
        """Unless another controller has made a generation meanwhile, in which it may have a seat."""
        following = self._control.newest + 1

        def looked(taken: bool) -> None:
            if taken:
                self._handle(GenerationTaken(generation=following))
            else:
                self._kill(kill.member, kill.node, f"has left: {kill.reason}")

        self._errands.run(lambda: self._ledger.has_generation(following), looked)

    def _create(self, plan: Plan) -> None:
        self._told.say(f"generation {plan.generation}: {plan.size} ranks, {plan.reason}")

        creator = launch.new_creator()

        def create() -> tuple[bool, dict[str, str], Former | None]:
            domains = launch.domains() if self._job.settings.snapshot else {}
            return self._ledger.create(plan, creator), domains, self._former_rows(plan)

        self._errands.run(create, lambda done: self._created(plan, *done))

    def _former_rows(self, plan: Plan) -> Former | None:
        if plan.restore is None or plan.restore.key.attempt == self._job.attempt:
            return None
        return self._showing.former_rows(plan.restore.key.attempt, plan.restore.key.step)

    def _created(self, plan: Plan, created: bool, domains: dict[str, str], former: Former | None) -> None:
        if not created:
            self._handle(GenerationTaken(generation=plan.generation))
            return
        if plan.restore is not None:
            step, anew = plan.restore.key.step, plan.restore.key.attempt != self._job.attempt
            self._told.records.rewind(plan.generation, step, plan.branch, anew=anew, former=former)
            self._showing.back_to(plan.generation, step)
        self._protect(plan, domains)
        self._handle(GenerationCreated(generation=plan.generation))

    def _protect(self, plan: Plan, domains: dict[str, str]) -> None:
        if self._job.settings.snapshot is not None:
            self._protection.planned(plan, domains, self._workers.keepers)

    def _ask_keepers(self, instruction: TakeInventory | DecodeImages) -> None:
        keepers, now, limit_s = self._workers.keepers, time.monotonic(), self._answer_limit_s
        if isinstance(instruction, TakeInventory):
            asked, ended = instruction.asked, instruction.ended
            self._protection.take_inventory(asked, ended, keepers, self._presence.nodes_alive, now + limit_s)
        else:
            self._told.say(f"going back to {instruction.elected.reason}")
            self._protection.rebuild(instruction.asked, instruction.elected, keepers, now, limit_s)

    # Leases, restart

    def _renew(self) -> None:
        if self._ending.outcome is not None:
            return
        if self._driver.expired():
            self._handle(StopAsked(why=DRIVER_GONE))
            return
        self._notes.count(self._control.chronicle, self._control.newest)
        self._workers.renew(self._lifelines.address, self._told.records.fetched)
        self._protection.tell(self._workers.keepers)

    def _resume(self) -> None:
        """After a restart: learn what is on record, and which of the processes on record still live."""
        if self._ledger.begin():
            self._showing.begin(anew=True)
            self._happened(Happening(kind="run began", reason=f"attempt {self._job.attempt}"))
            if (lineage := self._ledger.lineage()) is not None:
                self._control.restoring.lineage, self._control.going_back.lineage_known = lineage, True
            return
        self._showing.begin(anew=False)
        self._happened(Happening(kind="controller restarted", reason="it had died"))
        plans, (spawned, gone) = self._ledger.plans(), self._workers.find()
        if (counted := self._ledger.counted()) is not None:
            self._control.chronicle.take_up(*counted)
        self._events.put(Resumed(plans=plans, spawned=tuple(sorted(spawned.items())), gone=tuple(sorted(gone))))
        self._workers.taken_up()
        for member, node in spawned.items():
            if member not in gone:
                self._occupancy.ordered(member, node, time.monotonic())
        for event in self._departures.on_record():
            self._events.put(event)
        self._told.records.resume(plans)
        for plan in plans:
            if plan.restore is not None:
                self._showing.back_to(plan.generation, plan.restore.key.step)
        self._told.saved.news = self._ledger.said()
        if plans:
            self._protect(plans[-1], launch.domains())
        for node in sorted({*spawned.values(), *self._workers.keepers}):
            self._detector.expect(node, time.monotonic())
        for member in sorted(gone | set(spawned) - set(self._workers.ranks)):
            self._events.put(RankGone(member=member, why="it was gone when the controller came back"))
        self._told.say("the controller was restarted and has taken up where it was")
