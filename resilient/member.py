"""A rank as a member of its team: the seat's decisions carried out by threads around it.

Three threads meet here, under one lock: the training thread asks what to do next and waits; the
control thread brings plans; a generation's thread brings formed groups and results. Whatever comes
from a generation that is no longer the current one is refused.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from actors.group import Group
from actors.post import Post
from actors.priority import raise_priority
from actors.rank import Host
from snapshot.capture import capture
from snapshot.core.digest import StatePart
from snapshot.core.lifecycle import Ordinal
from snapshot.load import load
from snapshot.table import StateTable, still

from .core.difference import rollback_after
from .core.events import RankCrashed, RankFailed, RankReady, RankReported, RankReturned
from .core.lane import Agreed, Wish
from .core.pace import Pace
from .core.plan import Address, Plan, Restore
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
    Held,
    LeafFolded,
    Leave,
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
from .generation import GenerationThread, Holding, Superseded
from .payload import Payload
from .probe import probe
from .records import StepValues, Untold
from .restoring import fetch, fetch_stored
from .snapshots import Seating, Snapshots
from .stage_side import StageSide
from .sums import StepSums
from .team import Loop

WAKE_S = 1.0
"""How often waits look around although nothing has woken them."""


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
    ) -> None:
        """storage: URL of the checkpoints, if there are any."""
        self.number = host.member
        self.workers = workers
        self.reduction = reduction
        self.threads = threads
        self.device = device
        self._host = host
        self._changed = threading.Condition(threading.RLock())
        self._seat = Seat(member=host.member)
        self._loop: Loop | None = None
        self._ready: RankReady | None = None
        self._returned: RankReturned | None = None
        self._failed: RankFailed | None = None
        self._current: GenerationThread | None = None
        self._retired: GenerationThread | None = None
        """The one before, whose connections stay open until the next has formed."""
        self._held: tuple[int, StateTable] | None = None
        """A generation, and the state at its first boundary, for joiners."""
        self._submitted: tuple[int, int] | None = None
        self._untold = Untold()
        self._losses: list[float] = []
        self._pace = Pace()
        self._computing = False
        """The training thread has a leaf in hand, and may be folding it: nobody else touches the partial sums."""
        self._to_discard = False
        """The partial sums, that leaf's too, are dropped as soon as it is folded."""
        self._captured_layers = range(0)
        """Of a pipeline, those that this rank held at the newest capture."""
        self._crossing = False
        """The training thread is at a step's boundary, and reads the state."""
        self._parked = False
        """The training thread waits outside of the user's code, and keeps its hands off the state."""
        self._loading = threading.Lock()
        self._snapshots = snapshots
        self._storage = storage
        self._to_capture: tuple[int, Seating, bool] | None = None
        """The step at whose start all ranks capture the state, under which membership, and whether to make it
        durable."""
        self._control_digest = 0
        self._control_state: dict[str, object] = {}

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
        digest, fields = probe(self.threads)
        raise_priority()
        with self._changed:
            self._loop = loop
            self._ready = RankReady(
                member=self.number,
                node=self._host.node,
                address=Address(
                    host=self._host.ip, port=self._host.store_port, post=loop.stage.post_port if loop.stage else 0
                ),
                micro_batches=loop.sums.micro_batches,
                steps=loop.steps,
                probe=digest,
                probe_fields=fields,
                pipeline=loop.shape,
            )
        self.report()
        self.park()

    def park(self) -> None:
        self._host.words.activity("waiting")
        with self._changed:
            self._parked = True
            self._changed.notify_all()
            while self._seat.plan is None or self._seat.restoring or not self._seat.settled:
                self._changed.wait(WAKE_S)
            self._parked = False
        self._host.words.activity("computing")

    def next(self) -> Compute | Apply | Park:
        with self._changed:
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
        with self._changed:
            while True:
                todo = self._seat.next()
                if isinstance(todo, Apply | Park):
                    self._host.words.moved("computing", self._seat.step, self.generation)
                    return todo
                if isinstance(todo, Compute) and (action := choose(self._seat.work - self._seat.folded)) is not None:
                    self._host.words.moved("computing", self._seat.step, self.generation)
                    self._computing = True
                    return action
                self._computing = False
                self._host.words.moved("waiting", self._seat.step, self.generation)
                if isinstance(todo, Reduce):
                    self._submit(todo)
                self._come_to_rest()
                self._changed.wait(WAKE_S)

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        with self._changed:
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
            if self._snapshots is not None:
                self._snapshots.gate()
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
        if self._snapshots is not None:
            self._snapshots.gate()

    def applied(self, values: Mapping[int, Mapping[str, float]]) -> None:
        with self._changed:
            self._crossing = True
            step = self._seat.step
            account = StepValues(
                branch=self._seat.plan.branch if self._seat.plan else 0,
                step=step,
                losses=tuple(self._losses),
                values={leaf: dict(row) for leaf, row in values.items()},
                snapshots=self._snapshots.account() if self._snapshots is not None and self.rank == 0 else {},
            )
            self._untold.committed(account)
            self._do(self._seat.handle(Applied(step=step)))
            self._changed.notify_all()
        if self.rank == 0 or values:
            self._host.tell(account)
        if self._snapshots is not None:
            self._capture(self._snapshots)
        self._hold_for_joiners()
        with self._changed:
            self._crossing = False
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
                self._held = plan.generation, table
                self._do(self._seat.handle(Held(generation=plan.generation)))
                self._changed.notify_all()

    def _capture(self, snapshots: Snapshots) -> None:
        with self._changed:
            plan, step, agreed = self._seat.plan, self._seat.step, self._to_capture
            self._to_capture = None
        if plan is None or self._seat.restoring:
            return
        seating = Seating(generation=plan.generation, rank=plan.rank_of(self.number), world=plan.size)
        wanted = agreed is not None and agreed[0] == step
        if wanted and agreed is not None and agreed[1] != seating:
            if plan.kind == "unplanned":  # somebody has died since, whose share nobody can capture
                return
            seating = agreed[1]
        durable = wanted and agreed is not None and agreed[2]
        ordinal = Ordinal(plan.branch, step)
        if not self.has_stages:
            snapshots.boundary(ordinal, self.objects(), seating, wanted=wanted, durable=durable)
        elif not self.stage.spelled_anew():  # else the others would spell another structure than this rank
            stage, self._captured_layers = self.stage, self.stage.held
            snapshots.boundary(
                ordinal,
                self.objects(),
                seating,
                wanted=wanted,
                durable=durable,
                ranges=stage.captured,
                compared=stage.whereabouts.is_common,
            )

    def roll_back(self, rollback: Rollback) -> None:
        with self._changed:
            self._do(self._seat.handle(rollback))

    def finished(self) -> bool:
        with self._changed:
            while not self._seat.restoring and not self._seat.settled:
                self._come_to_rest()
                self._changed.wait(WAKE_S)
            if self._seat.restoring:
                return False
            self._do(self._seat.handle(Finished(step=self._seat.step)))
        if self._snapshots is not None:
            self._snapshots.gate()  # the last snapshot is whole before this process may end
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
        self._control_state = self._loop.control_state()
        self._control_digest = zlib.crc32(json.dumps(self._control_state, sort_keys=True).encode())
        self._current.submit(todo.step)

    # Brought by the control thread

    def deliver(self, message: object) -> None:
        if isinstance(message, Plan):
            with self._changed:
                self._do(self._seat.handle(PlanArrived(plan=message)))
                self._changed.notify_all()

    def recorded_through(self, step: int) -> None:
        """The driver has everything up to this step. What it should have by now, and has not, is told again."""
        with self._changed:
            self._untold.acknowledged(step)
            rows = self._rows(overdue=True)
        if rows:
            self._host.tell(*rows)

    def _rows(self, *, overdue: bool = False) -> tuple[StepValues, ...]:
        """None while the state is not that of the plan: what a snapshot brings may not be there yet."""
        plan = self._seat.plan
        if plan is None or self._seat.formed != plan.generation:
            return ()
        if overdue:
            return self._untold.overdue(plan.branch, speaks_for_all=plan.rank_of(self.number) == 0)
        return self._untold.rows(plan.branch)

    def report(self) -> None:
        """Say how things stand; repeated from time to time, since any message may be lost."""
        with self._changed:
            report = replace(self._seat.report(), leaf_s=self._pace.leaf_s)
            if self.has_stages:
                timing = self.stage.timing
                report = replace(report, layer_s=timing.layer_s, idle=timing.idle)
            messages: list[Any] = [RankReported(report=report)]
            for once in (self._ready, self._failed, self._returned):
                if once is not None:
                    messages.insert(0, once)
            if self._returned is not None:  # the run may end with this message: rows go before it
                messages[:0] = self._rows()
        self._host.tell(*messages)

    def repeat_records(self) -> None:
        with self._changed:
            rows = self._rows()
        if rows:
            self._host.tell(*rows)

    def crashed_here(self, text: str) -> None:
        """An error of the machine: another process takes this one's place."""
        self._host.tell_at_last(RankCrashed(member=self.number, step=self._seat.step, traceback=text))

    def failed(self, step: int, text: str) -> None:
        self._failed = RankFailed(member=self.number, step=step, traceback=text)
        self.report()

    def returned(self, digest: str | StatePart) -> None:
        whole, part = (digest, None) if isinstance(digest, str) else ("", digest)
        self._returned = RankReturned(member=self.number, step=self._seat.step, digest=whole, part=part)
        self.report()

    # Brought by a generation's thread

    def connect(self, plan: Plan, rank: int) -> Group:
        return Group(
            store=(plan.store.host, plan.store.port),
            host=self._host.ip,
            prefix=f"{self._host.key}/{plan.generation}",
            rank=rank,
            size=plan.size,
            device=self.device,
        )

    def state_received(self, plan: Plan, complete: int) -> None:
        with self._changed:
            self.require_current(plan.generation)
            self._do(self._seat.handle(StateReceived(generation=plan.generation, complete=complete)))

    def formed(self, plan: Plan, complete: int, caught_up: Payload | None) -> None:
        with self._loading, self._changed:
            if not self._is_current(plan):
                return
            self._retired, self._held = None, None
            if caught_up is not None:
                self.sums.accept(caught_up)
            if self.has_stages:
                self._settle(plan)
            self._do(self._seat.handle(Formed(generation=plan.generation, complete=complete)))
            self._changed.notify_all()
        if plan.rank_of(self.number) == 0:
            self.repeat_records()  # whoever was rank 0 before may have died with the last rows untold

    def _settle(self, plan: Plan) -> None:
        self.leave_memory()
        self.stage.settle(plan, plan.rank_of(self.number))

    def leave_memory(self) -> None:
        """Nothing is copied from the state any more: some of its memory may be given back."""
        if self._snapshots is not None:
            self._snapshots.gate()

    def bring(self, plan: Plan, rank: int, *, initial: bool) -> None:
        """Memory for this rank's stage; never for a generation that was left behind, in which training goes on."""
        if initial:  # layers are built, which may take long; nobody trains yet
            self.stage.bring(plan, rank, initial=True)
            return
        with self.staying(plan.generation):
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
            if snapshot.capture:
                seating = Seating(generation=plan.generation, rank=plan.rank_of(self.number), world=plan.size)
                self._to_capture = step + 1, seating, snapshot.save
            event = ExchangeDone(generation=plan.generation, step=step, agreed=agreed)
            self._do(self._seat.handle(event))
            self._changed.notify_all()
        if plan.rank_of(self.number) == 0:
            self.report()

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
        with self._changed:
            if not self._is_current(plan):
                return
        self.failed(self._seat.step, "".join(traceback.format_exception(error)))

    def wait_for_boundary(self, generation: int) -> None:
        with self._changed:
            while not self._seat.at_boundary or self._crossing:
                self.require_current(generation)
                self._changed.wait(WAKE_S)
            self.require_current(generation)

    def held_state(self, generation: int) -> StateTable:
        """Of the boundary at which this generation begins."""
        with self._changed:
            while self._held is None or self._held[0] != generation:
                self.require_current(generation)
                self._changed.wait(WAKE_S)
            self.require_current(generation)
            return self._held[1]

    def wait_until_parked(self, generation: int) -> None:
        with self._changed:
            while not self._parked:
                self.require_current(generation)
                self._changed.wait(WAKE_S)
            self.require_current(generation)

    @contextmanager
    def changing(self, generation: int) -> Iterator[None]:
        """Around changes to what this rank holds: one thread at a time, and none that was left behind."""
        with self._loading:
            self.require_current(generation)
            yield

    def load(self, generation: int, table: StateTable) -> None:
        """Write this state into the user's objects; one at a time, since a thread left behind may still do so."""
        with self.changing(generation):
            load(self.objects(), table)

    def fetch(self, restore: Restore, plan: Plan) -> StateTable:
        wanted = self.stage.wanted(plan, plan.rank_of(self.number)) if self.has_stages else None
        if restore.folder:
            return fetch_stored(self._storage, restore.folder, wanted)
        return fetch(restore, self._host.secret, wanted)

    def wish(self, plan: Plan, step: int) -> Wish:
        """What this rank brings into the lane about the snapshot of the state after `step`."""
        if self._snapshots is None:
            return Wish()
        steps = self._loop.steps if self._loop is not None else None
        ordinal = Ordinal(plan.branch, step + 1)
        wish = self._snapshots.wish(ordinal, plan.generation, steps, renewed=plan.base > 0)
        if self.has_stages and self.stage.held != self._captured_layers:
            return replace(wish, digest=None)  # of other layers than those of the ranks that it would be compared with
        return wish

    def agreed_on_snapshots(self, plan: Plan, step: int, agreed: Agreed) -> None:
        """What the lane says about the same."""
        if self._snapshots is not None:
            self._snapshots.agreed(Ordinal(plan.branch, step + 1), agreed, plan.generation)

    def verified(self, plan: Plan) -> int:
        return -1 if self._snapshots is None else self._snapshots.verified(plan.branch)

    def trust(self, ordinal: Ordinal) -> None:
        if self._snapshots is not None:
            self._snapshots.trust(ordinal)

    def state_differs(self, plan: Plan, step: int, rows: Sequence[Sequence[int]]) -> None:
        """Some ranks hold another state at the start of this step than others. rows: by rank the digest of it, and
        the newest step of which the rank knows that all held the same."""
        wanted = rollback_after(plan, step, [row[0] for row in rows], max(row[1] for row in rows))
        with self._changed:
            if self._is_current(plan):
                self._do(self._seat.handle(wanted))
                self._changed.notify_all()

    @contextmanager
    def staying(self, generation: int) -> Iterator[None]:
        """Within it this generation is not left behind."""
        with self._changed:
            self.require_current(generation)
            yield

    def require_current(self, generation: int) -> None:
        with self._changed:
            if self.generation != generation:
                raise Superseded

    def newest_held(self, generation: int) -> int:
        with self._changed:
            self.require_current(generation)
            return self._seat.newest_held

    def widen(self, generation: int, buffers: list[str]) -> None:
        """Let more buffers take part; never for a generation that was left behind."""
        with self._changed:
            self.require_current(generation)
            self.sums.widen(buffers)

    def take_result(self, generation: int) -> Payload:
        with self._changed:
            self.require_current(generation)
            return self.sums.pool.take()

    def control_digest(self) -> int:
        return self._control_digest

    def control_state(self) -> dict[str, object]:
        return self._control_state

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
                    self.report()
                case Leave():
                    os._exit(0)

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
        if plan.kind == "restored":
            self._to_capture = None
        holding = Holding(
            has_state=self._seat.has_state,
            complete=self._seat.complete,
            kept=self.sums.kept if self._loop is not None else None,
            reduced=None if former is None else former.reduced,
            layers=self.stage.held if self.has_stages else range(0),
        )
        self._current = GenerationThread(self, plan, holding)
        self._current.start()
