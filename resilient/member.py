"""A rank as a member of its team: the seat's decisions carried out by threads around it.

Three threads meet here, under one lock: the training thread asks what to do next and waits; the
control thread brings plans; a generation's thread brings formed groups and results. Whatever comes
from a generation that is no longer the current one is refused.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from typing_extensions import assert_never

from actors.device import is_device_error, is_out_of_memory, name_of
from actors.group import Group
from actors.pending import Waits
from actors.post import Post
from actors.priority import raise_priority
from actors.rank import Host
from actors.reachability import unreachable
from actors.remark import Remark
from snapshot.capture import capture
from snapshot.table import StateTable, still

from .capturing import Capturing
from .core.difference import rollback_after
from .core.events import LinksProbed
from .core.instructions import ProbeLinks
from .core.lane import Agreed
from .core.limits import Limits
from .core.pace import Pace
from .core.plan import Plan, Restore
from .core.schedule import Action
from .core.seat import (
    Applied,
    Apply,
    Compute,
    Discard,
    ExchangeDone,
    ExchangeFailed,
    Finished,
    Form,
    Formed,
    FormFailed,
    GoesOn,
    LeafFolded,
    Leave,
    MayBegin,
    Park,
    PlanArrived,
    Reduce,
    Report,
    Rested,
    Rollback,
    Seat,
    SeatInstruction,
    StateReceived,
)
from .generation import GenerationThread, Holding
from .payload import Payload
from .probe import probe
from .records import StepValues, Untold
from .restoring import fetch, fetch_stored
from .snapshots import Snapshots
from .stage_side import StageSide
from .sums import StepSums
from .team import Loop
from .telling import Telling
from .turns import WAKE_S, Turns

STAGED = (
    "ranks share a GPU, which NCCL refuses: gradients go through the host's memory. The bits are the same, but it is "
    'slower than a GPU for each rank, which resources={"GPU": 1} gives'
)


class Member:
    """Implements `Team` over other processes."""

    def __init__(
        self,
        host: Host,
        *,
        workers: tuple[int, int],
        reduction: Literal["exact", "fast"],
        threads: int,
        device: torch.device,
        snapshots: Snapshots | None,
        storage: str = "",
        detection_s: float = 2.0,
    ) -> None:
        """storage: URL of the checkpoints, if there are any."""
        self.number = host.member
        self.workers = workers
        self._limits = Limits(min_workers=workers[0], max_workers=workers[1], detection_s=detection_s)
        self.reduction = reduction
        self.threads = threads
        self.device = device
        self._host = host
        self._changed = threading.Condition(threading.RLock())
        self._seat = Seat(member=host.member)
        self._loop: Loop | None = None
        self._current: GenerationThread | None = None
        self._retired: GenerationThread | None = None
        """The one before, whose connections stay open until the next has formed."""
        self._submitted: tuple[int, int] | None = None
        self._untold = Untold()
        self._losses: list[float] = []
        self._pace = Pace()
        self.telling = Telling(host, self._seat, self._untold, self._pace, self._changed)
        self.telling.stalled = self._stalled
        self.capturing = Capturing(snapshots, self._seat, self.objects, self._changed)
        self.telling.verified = self._verified
        self.turns = Turns(self._seat, self.objects, self._changed)
        self._computing = False
        """The training thread has a leaf in hand, and may be folding it: nobody else touches the partial sums."""
        self._to_discard = False
        """The partial sums, that leaf's too, are dropped as soon as it is folded."""
        self._probing = threading.Lock()
        """Held while links to others are probed."""
        self._in_user_code = True
        """The training thread is not in here."""
        self._said_staged = False
        self._storage = storage
        self._control_digest = 0

    # Team: asked by the training thread

    @property
    def step(self) -> int:
        return self._seat.step

    @property
    def generation(self) -> int:
        return self._seat.plan.generation if self._seat.plan else 0

    @property
    def rank(self) -> int:
        return self._seat.plan.rank_of(self.number) if self._seat.plan else 0

    @property
    def size(self) -> int:
        return self._seat.plan.size if self._seat.plan else 1

    @property
    def skipped(self) -> tuple[int, ...]:
        return self._seat.plan.skipped if self._seat.plan else ()

    @property
    def sums(self) -> StepSums:
        assert self._loop is not None
        return self._loop.sums

    def enter(self, loop: Loop) -> None:
        digest, fields = probe(self.threads, self.device)
        raise_priority()
        with self._changed:
            self._loop = loop
            self.telling.enter(loop, digest, fields)
            self.capturing.enter(loop)
        self.telling.report()
        self.park()

    def go_on(self, loop: Loop) -> None:
        with self._changed:
            self._loop = loop
            self.capturing.enter(loop)
            self.telling.ended_with = loop.ended_with
            self._do(self._seat.handle(GoesOn(step=self._seat.step)))
        self._host.words.activity("computing")

    def park(self) -> None:
        self._host.words.activity("waiting")
        with self._inside():
            self.turns.park()
        self._host.words.activity("computing")

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """The training thread is here, and may wait for others."""
        self._in_user_code = False
        try:
            yield
        finally:
            self._in_user_code = True

    def next(self) -> Compute | Apply | Park:
        with self._changed, self._inside():
            while True:
                todo = self._seat.next()
                if isinstance(todo, Compute | Apply | Park):
                    self._host.words.moved("computing", self._seat.step, self.generation)
                    if isinstance(todo, Compute):
                        self._computing = True
                        self._pace.handed_out(time.monotonic())
                    return todo
                self._host.words.moved("waiting", self._seat.step, self.generation)
                if isinstance(todo, Reduce):
                    self._submit(todo)
                self._come_to_rest()
                self._changed.wait(WAKE_S)

    def next_of(self, choose: Callable[[frozenset[int]], Action | None]) -> Action | Apply | Park:
        with self._changed, self._inside():
            while True:
                todo = self._seat.next()
                if isinstance(todo, Apply | Park):
                    self._host.words.moved("computing", self._seat.step, self.generation)
                    return todo
                if isinstance(todo, Compute) and (action := choose(self._seat.work - self._seat.folded)) is not None:
                    self._host.words.moved("computing", self._seat.step, self.generation)
                    self._computing = True
                    return action
                self._lay_down()
                self._host.words.moved("waiting", self._seat.step, self.generation)
                if isinstance(todo, Reduce):
                    self._submit(todo)
                self._come_to_rest()
                self._changed.wait(WAKE_S)

    def _lay_down(self) -> None:
        """The training thread has nothing in hand."""
        if self._computing:
            self._computing = False
            self._changed.notify_all()

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        with self._changed, self._inside():
            while not self._seat.restoring and not ready():
                self._host.words.moved("waiting", self._seat.step, self.generation)
                self._changed.wait(WAKE_S)
            self._host.words.moved("computing", self._seat.step, self.generation)
            return not self._seat.restoring

    def parked(self) -> bool:
        with self._changed:
            return self._seat.restoring

    def post(self) -> Post:
        return Post(self._host.ip, self._host.secret, arrived=self.mail, broken=self.unreachable)

    def mail(self) -> None:
        """Something has come from another stage."""
        with self._changed:
            self._changed.notify_all()

    def unreachable(self, peer: object, why: str) -> None:
        """What is sent to this member can't be: a link of the generation is broken, if the member is in it."""
        with self._changed:
            plan = self._seat.plan
        if plan is not None and peer in plan.ranks:
            self.link_broken(plan, why)

    def _come_to_rest(self) -> None:
        """If the others go on without this rank, and it has done and told all that it had to."""
        if self._seat.departed and self._seat.at_boundary and not self._seat.at_rest:
            self.capturing.gate()
            self._do(self._seat.handle(Rested()))

    def leaves(self) -> tuple[int, ...]:
        with self._changed:
            return tuple(sorted(self._seat.work))

    def folded(self, leaf: int) -> None:
        with self._changed:
            self._pace.folded(time.monotonic())
            self._computing, dropped = False, self._to_discard
            if dropped:
                self._discard()
            else:
                self._do(self._seat.handle(LeafFolded(step=self._seat.step, leaf=leaf)))

    def committed(self, losses: list[float]) -> None:
        self._losses = losses
        self.capturing.gate()

    def applied(self, values: Mapping[int, Mapping[str, float]]) -> None:
        with self._changed:
            self.turns.crossing = True
            step = self._seat.step
            account = StepValues(
                branch=self._seat.plan.branch if self._seat.plan else 0,
                step=step,
                losses=tuple(self._losses),
                values={leaf: dict(row) for leaf, row in values.items()},
                snapshots=self.capturing.account() if self.rank == 0 else {},
            )
            self._untold.committed(account)
            self._do(self._seat.handle(Applied(step=step)))
            self._changed.notify_all()
        if self.rank == 0 or values:
            self._host.tell(account)
        self.capturing.boundary()
        self._hold_for_joiners()
        with self._changed:
            self.turns.crossing = False
            self._changed.notify_all()

    def _hold_for_joiners(self) -> None:
        """They receive the state of this boundary while the step is under way."""
        with self._changed:
            plan = self._seat.plan
            if plan is None or not self._seat.awaited:
                return
        table = still(capture(self.objects()))
        with self._changed:
            if self._is_current(plan):
                self.turns.held = plan.generation, table
                self._do(self._seat.handle(MayBegin(generation=plan.generation, complete=self._seat.complete)))
                self._changed.notify_all()

    def roll_back(self, rollback: Rollback) -> None:
        with self._changed:
            self._do(self._seat.handle(rollback))

    def finished(self) -> bool:
        with self._changed, self._inside():
            while not self._seat.restoring and not self._seat.settled:
                self._host.words.activity("waiting")
                self._come_to_rest()
                self._changed.wait(WAKE_S)
            if self._seat.restoring:
                return False
            self._do(self._seat.handle(Finished(step=self._seat.step)))
        self.capturing.gate()  # the last snapshot is whole before this process may end
        self._host.words.activity("paused")
        return True

    def pause(self, reason: str | None) -> None:
        self._pace.paused()
        self._host.words.activity("paused" if reason else "computing")

    def _submit(self, todo: Reduce) -> None:
        if self._submitted == (todo.plan.generation, todo.step):
            return
        assert self._current is not None and self._current.plan is todo.plan
        self._submitted = todo.plan.generation, todo.step
        assert self._loop is not None
        self._control_digest = self._loop.control()
        self._current.submit(todo.step)

    # Brought by the control thread

    def deliver(self, message: object) -> None:
        match message:
            case Plan():
                with self._changed:
                    self._do(self._seat.handle(PlanArrived(plan=message)))
                    self._changed.notify_all()
            case ProbeLinks():
                threading.Thread(target=self._probe_links, args=(message,), name="probe links", daemon=True).start()
            case _:
                self._host.tell(Remark(text=f"rank refuses a message of kind {type(message).__name__}"))

    def _probe_links(self, asked: ProbeLinks) -> None:
        """One at a time: where others are many it takes long, and it is asked for again."""
        if not self._probing.acquire(blocking=False):
            return
        try:
            others = {
                place.member: (place.address.host, place.address.port)
                for place in asked.places
                if place.member != self.number
            }
            found = unreachable(others, self._host.secret, self._limits.reach_s)
        finally:
            self._probing.release()
        self._host.tell(LinksProbed(member=self.number, generation=asked.generation, unreachable=found))

    def _verified(self) -> int:
        return self.capturing.verified(self._seat.plan) if self._seat.plan else -1

    def _stalled(self) -> bool:
        """Under the lock."""
        if self._current is None or (self._in_user_code and not self._seat.finished):
            return False
        return self._current.waits.lasted_s() > self._limits.stall_s

    # Brought by a generation's thread

    def connect(self, plan: Plan, rank: int, waits: Waits) -> Group:
        group = Group(
            store=(plan.store.host, plan.store.port),
            secret=self._host.secret,
            host=self._host.ip,
            prefix=f"{self._host.key}/{plan.generation}",
            rank=rank,
            size=plan.size,
            device=self.device,
            device_name=name_of(self.device),
            waits=waits,
        )
        if group.is_staged and not self._said_staged:
            self._said_staged = True
            self._host.tell(Remark(text=f"member {self.number}: {STAGED}"))
        return group

    def state_received(self, plan: Plan, complete: int) -> None:
        with self._changed:
            self.turns.require_current(plan.generation)
            self._do(self._seat.handle(StateReceived(generation=plan.generation, complete=complete)))

    def begin_ahead(self, plan: Plan, complete: int) -> None:
        """In a pipeline: all that computing needs of this rank's layers is here, the state at the start of step
        complete + 1. What updates need comes while it computes."""
        with self.turns.changing(plan.generation), self._changed:
            self.turns.require_current(plan.generation)
            self.stage.begin(plan, plan.rank_of(self.number))
            self._do(self._seat.handle(MayBegin(generation=plan.generation, complete=complete)))
            self._changed.notify_all()

    def formed(self, plan: Plan, complete: int, caught_up: Payload | None) -> None:
        with self.turns.loading, self._changed:
            while self._is_current(plan) and self._computing and self.has_stages and self.stage.goes_back:
                self._changed.wait(WAKE_S)  # it has been told to do nothing more of the change that failed
            if not self._is_current(plan):
                return
            retired, self._retired, self.turns.held = self._retired, None, None
            if retired is not None:
                retired.close()
            if caught_up is not None:
                self.sums.accept(caught_up)
            if self.has_stages:
                self._settle(plan)
            self._do(self._seat.handle(Formed(generation=plan.generation, complete=complete)))
            self._changed.notify_all()
        if plan.rank_of(self.number) == 0:
            self.telling.repeat_records()  # whoever was rank 0 before may have died with the last rows untold

    def _settle(self, plan: Plan) -> None:
        self.capturing.gate()
        self.stage.settle(plan, plan.rank_of(self.number))

    def bring(self, plan: Plan, rank: int, *, initial: bool) -> None:
        """Memory for this rank's stage; never for a generation that was left behind, in which training goes on."""
        if initial:  # layers are built, which may take long; nobody trains yet
            self.stage.bring(plan, rank, initial=True)
            return
        with self.turns.staying(plan.generation):
            self.stage.bring(plan, rank)

    @property
    def has_stages(self) -> bool:
        return self._loop is not None and self._loop.stage is not None

    @property
    def stage(self) -> StageSide:
        """What this rank holds of a pipeline."""
        assert self._loop is not None and self._loop.stage is not None
        return self._loop.stage

    def spelled_anew(self) -> bool:
        return self.has_stages and self.stage.spelled_anew()

    def exchanged(self, plan: Plan, step: int, agreed: int, snapshot: Agreed, result: Payload) -> None:
        with self._changed:
            if not self._is_current(plan):
                return
            self.sums.accept(result)
            self.capturing.exchanged(plan, step, snapshot)
            event = ExchangeDone(generation=plan.generation, step=step, agreed=agreed)
            self._do(self._seat.handle(event))
            self._changed.notify_all()
        if plan.rank_of(self.number) == 0:
            self.telling.report()

    def link_broken(self, plan: Plan, why: str) -> None:
        with self._changed:
            if not self._is_current(plan):
                return
            if self._seat.forming:
                instructions = self._seat.handle(FormFailed(generation=plan.generation))
            else:
                instructions = self._seat.handle(ExchangeFailed(generation=plan.generation, step=self._seat.step))
            self._do(instructions)
            self._changed.notify_all()

    def crashed(self, plan: Plan, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        if is_device_error(error) or is_out_of_memory(error):  # what is allocated in here is no decision of the user's
            self.telling.crashed_here(text)
            os._exit(1)
        with self._changed:
            if not self._is_current(plan):
                return
        self.telling.failed(self._seat.step, text)

    def fetch(self, restore: Restore, plan: Plan) -> StateTable:
        wanted = self.stage.wanted(plan, plan.rank_of(self.number)) if self.has_stages else None
        if restore.folder:
            return fetch_stored(self._storage, restore.folder, wanted)
        return fetch(restore, self._host.secret, wanted)

    def state_differs(self, plan: Plan, step: int, rows: Sequence[Sequence[int]]) -> None:
        """Some ranks hold another state at the start of this step than others. rows: by rank the digest of it, and
        the newest step of which the rank knows that all held the same."""
        self.wants_back(plan, rollback_after(plan, step, [row[0] for row in rows], max(row[1] for row in rows)))

    def wants_back(self, plan: Plan, wanted: Rollback) -> None:
        """All ranks of this generation have found that they have to go back."""
        with self._changed:
            if self._is_current(plan):
                self._do(self._seat.handle(wanted))
                self._changed.notify_all()

    def newest_held(self, generation: int) -> int:
        with self._changed:
            self.turns.require_current(generation)
            return self._seat.newest_held

    def widen(self, generation: int, buffers: list[str]) -> None:
        """Let more buffers take part; never for a generation that was left behind."""
        with self._changed:
            self.turns.require_current(generation)
            self.sums.widen(buffers)

    def take_result(self, generation: int) -> Payload:
        with self._changed:
            self.turns.require_current(generation)
            return self.sums.pool.take()

    def control_digest(self) -> int:
        return self._control_digest

    def control_state(self) -> dict[str, object]:
        """While the training thread waits for the exchange."""
        assert self._loop is not None
        return self._loop.control_state()

    def objects(self) -> Mapping[str, object]:
        assert self._loop is not None
        return {**self._loop.objects(), "run.losses": self._untold.recent}

    def _is_current(self, plan: Plan) -> bool:
        return self.generation == plan.generation

    # What the seat instructs

    def _do(self, instructions: tuple[SeatInstruction, ...]) -> None:
        for instruction in instructions:
            match instruction:
                case Form(plan=plan):
                    self._form(plan)
                case Discard():
                    self._discard()
                case Report():
                    self.telling.report()
                case Leave():
                    os._exit(0)
                case _:
                    assert_never(instruction)

    def _discard(self) -> None:
        self._to_discard = self._computing
        if not self._computing:
            self.sums.partial.clear()

    def _form(self, plan: Plan) -> None:
        former = self._current
        if former is not None:
            if plan.kind == "planned" and former.plan.generation == plan.base:
                former.retire()
                self._retired = former
            else:
                former.abandon()
        self._submitted = None
        if self.has_stages:
            self.stage.adopted(plan)
        if plan.kind == "restored":
            self.capturing.forget()
        holding = Holding(
            has_state=self._seat.has_state,
            complete=self._seat.complete,
            kept=self.sums.kept if self._loop is not None else None,
            reduced=None if former is None else former.reduced,
            layers=self.stage.held if self.has_stages else range(0),
        )
        self._current = GenerationThread(self, plan, holding)
        self._current.start()
