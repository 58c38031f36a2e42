"""A run without Ray: rank processes on this machine, and the controller's real mind in the test.

Ranks are `resilient.member.Member`s in processes of their own, connected by real sockets; facts and instructions travel
over pipes. There are no keepers: what needs a snapshot is tested on a cluster. Starting a process takes a few
milliseconds, since it is forked from one that has imported everything.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import SimpleNamespace
from typing import Any, Protocol

from resilient.core.control import Control
from resilient.core.events import (
    Event,
    GenerationCreated,
    NodeSeen,
    RankFailed,
    RankGone,
    RankLeaving,
    RankReady,
    RankReported,
    RankReturned,
    Tick,
)
from resilient.core.instructions import CreateGeneration, End, Kill, SendPlan, Spawn
from resilient.core.plan import Plan
from resilient.core.recovery import Limits
from resilient.core.seat import SeatReport
from resilient.cutting import cut_between

NODE = "node"
LIMIT_S = 120.0


@dataclass
class Crew:
    """What became of a run."""

    values: dict[int, Any] = field(default_factory=dict)
    """By member, what its function returned."""
    end: End | None = None
    plans: list[Any] = field(default_factory=list)
    """All generations that were made."""


def run(
    function: Callable[..., Any],
    *args: Any,
    workers: tuple[int, int],
    on_report: Callable[[SeatReport, Hand], None] = lambda report, hand: None,
    room: int | None = None,
) -> Crew:
    """Train with as many ranks as allowed. on_report: sees each report, and may lend a hand. room: for so many ranks at
    once; for all if that is None."""
    crew = _Running(function, args, workers, on_report, room if room is not None else workers[1])
    try:
        return crew.run()
    finally:
        crew.close()


class Hand(Protocol):
    """What a test may do to a run."""

    def kill(self, member: int) -> None: ...

    def ask_to_leave(self, member: int) -> None: ...

    def room(self, ranks: int) -> None: ...

    def cut(self, member: int, other: int) -> None:
        """Break the connections between these two."""

    @property
    def plan(self) -> Plan | None: ...


class _Running:
    def __init__(self, function: Any, args: Any, workers: tuple[int, int], on_report: Any, most: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["resilient.member", "resilient.run", "tests.crew"])
        self._function, self._args, self._workers = function, args, workers
        self._on_report, self._most = on_report, most
        self._control = Control(limits=Limits(min_workers=workers[0], max_workers=workers[1]))
        self._processes: dict[int, Any] = {}
        self._pipes: dict[int, Connection] = {}
        self._crew = Crew()

    def run(self) -> Crew:
        self._handle(NodeSeen(node=NODE, capacity=self._most))
        deadline = time.monotonic() + LIMIT_S
        while self._crew.end is None or len(self._crew.values) < self._seated():
            assert time.monotonic() < deadline, f"not done in {LIMIT_S} s: {self._control.current}"
            for pipe in wait(list(self._pipes.values()), 0.1):
                member, connection = next(each for each in self._pipes.items() if each[1] is pipe)
                try:
                    self._hear(member, connection.recv())
                except (EOFError, ConnectionError):
                    self._gone(member)
            self._handle(Tick())
        return self._crew

    def _seated(self) -> int:
        if self._crew.end is None or self._crew.end.outcome != "finished":
            return 0
        return self._control.current.size if self._control.current is not None else 0

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()
            process.close()
        for pipe in self._pipes.values():
            pipe.close()

    def _hear(self, member: int, message: Any) -> None:
        if isinstance(message, RankReady | RankReported | RankReturned | RankFailed):
            if isinstance(message, RankReported):
                self._on_report(message.report, self)
            self._handle(message)
        elif isinstance(message, tuple) and message[0] == "value":
            self._crew.values[member] = message[1]

    def _gone(self, member: int) -> None:
        self._pipes.pop(member).close()
        if self._crew.end is None:
            self._handle(RankGone(member=member, why="its process ended"))

    def room(self, ranks: int) -> None:
        """From now on the node has room for so many."""
        self._handle(NodeSeen(node=NODE, capacity=ranks))

    def ask_to_leave(self, member: int) -> None:
        self._handle(RankLeaving(member=member, why="the test wants it"))

    def cut(self, member: int, other: int) -> None:
        cut_between(self._processes[member].pid, [self._processes[other].pid])

    @property
    def plan(self) -> Plan | None:
        return self._control.formed

    def kill(self, member: int) -> None:
        if member in self._pipes:
            os.kill(self._processes[member].pid, signal.SIGKILL)

    def _handle(self, event: Event) -> None:
        for instruction in self._control.handle(event, time.monotonic()):
            match instruction:
                case Spawn(member=member):
                    self._spawn(member)
                case Kill(member=member):
                    self.kill(member)
                case CreateGeneration(plan=plan):
                    self._crew.plans.append(plan)
                    self._handle(GenerationCreated(generation=plan.generation))
                case SendPlan(member=member, plan=plan):
                    if member in self._pipes:
                        self._pipes[member].send(plan)
                case End():
                    self._crew.end = instruction

    def _spawn(self, member: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_rank, args=(theirs, member, self._workers, pickle.dumps((self._function, self._args))), daemon=True
        )
        process.start()
        theirs.close()
        self._processes[member], self._pipes[member] = process, ours


def _rank(pipe: Connection, number: int, workers: tuple[int, int], job: bytes) -> None:
    import torch

    from actors.group import open_store
    from resilient.member import Member

    torch.set_num_threads(1)
    sending = threading.Lock()

    def tell(*messages: Any) -> None:
        with sending:
            for message in messages:
                pipe.send(message)

    store = open_store("127.0.0.1")
    words = SimpleNamespace(moved=lambda *_: None, activity=lambda *_: None)
    host: Any = SimpleNamespace(
        key="crew/1",
        member=number,
        node=NODE,
        secret="secret",
        ip="127.0.0.1",
        words=words,
        store=store,
        store_port=int(store.port),
        tell=tell,
        tell_at_last=tell,
        folder=None,
    )
    member = Member(host, workers=workers, reduction="exact", threads=1, device=torch.device("cpu"), snapshots=None)
    threading.Thread(target=_train, args=(member, tell, job), daemon=True).start()
    try:
        while True:
            member.deliver(pipe.recv()) if pipe.poll(0.1) else member.report()
    except (EOFError, ConnectionError, OSError):
        os._exit(0)


def _train(member: Any, tell: Any, job: bytes) -> None:
    from resilient.run import Run

    function, args = pickle.loads(job)
    try:
        run = Run(member, seed=0, device=member.device)
        value = function(run, *args)
        run.check_left_in_order()
        tell(("value", value))
        member.returned(run.digest())
    except BaseException:  # noqa: BLE001  the thread's edge
        member.failed(member.step, traceback.format_exc())
