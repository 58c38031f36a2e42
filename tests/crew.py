"""A run without Ray: rank processes on this machine, and the controller's real mind in the test.

Ranks are `resilient.member.Member`s in processes of their own, connected by real sockets; facts and instructions travel
over pipes. All are on one node, which has a keeper if the test gives it a folder: what needs more of them is tested on
a cluster. Starting a process takes a few milliseconds, since it is forked from one that has imported everything.
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol

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
from resilient.core.instructions import CreateGeneration, End, Kill, Say, SendPlan, Spawn, TakeInventory
from resilient.core.limits import Limits
from resilient.core.plan import Plan
from resilient.core.seat import SeatReport
from resilient.cutting import cut_between

from .crew_keeper import CrewKeeper

NODE, SECRET = "node", "secret"
LIMIT_S = 300.0

Which = Literal["all", "post", "group"]
"""Connections between stages, those of a generation's group, or both."""


@dataclass
class Crew:
    """What became of a run."""

    values: dict[int, Any] = field(default_factory=dict)
    """By member, what its function returned."""
    end: End | None = None
    plans: list[Any] = field(default_factory=list)
    """All generations that were made."""
    said: list[str] = field(default_factory=list)
    bubbles: list[dict[str, Any]] = field(default_factory=list)
    """As in a run's result."""


def run(
    function: Callable[..., Any],
    *args: Any,
    workers: tuple[int, int],
    on_report: Callable[[SeatReport, Hand], None] = lambda report, hand: None,
    room: int | None = None,
    folder: Path | None = None,
) -> Crew:
    """Train with as many ranks as allowed. on_report: sees each report, and may lend a hand. room: for so many ranks at
    once; for all if that is None. folder: for snapshots of every step; there are none if that is None."""
    crew = _Running(function, args, workers, on_report, room if room is not None else workers[1], folder)
    try:
        return crew.run()
    finally:
        crew.close()


class Hand(Protocol):
    """What a test may do to a run."""

    def kill(self, member: int) -> None: ...

    def ask_to_leave(self, member: int) -> None: ...

    def room(self, ranks: int) -> None: ...

    def cut(self, member: int, other: int, which: Which = "all") -> int:
        """Break the connections between these two. How many those were."""

    @property
    def plan(self) -> Plan | None: ...

    @property
    def said(self) -> list[str]:
        """What the controller's mind wants the user to read."""


class _Running:
    def __init__(
        self, function: Any, args: Any, workers: tuple[int, int], on_report: Any, most: int, folder: Path | None
    ) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["resilient.member", "resilient.run", "tests.crew"])
        self._function, self._args, self._workers = function, args, workers
        self._on_report, self._most = on_report, most
        self._folder, snapshots = folder, folder is not None
        self._control = Control(limits=Limits(min_workers=workers[0], max_workers=workers[1], snapshots=snapshots))
        self._keeper = CrewKeeper(NODE, folder, SECRET) if folder is not None else None
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
        self._crew.bubbles = self._control.bubbles.as_values()
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
        if self._keeper is not None:
            self._keeper.close()

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

    def cut(self, member: int, other: int, which: Which = "all") -> int:
        assert self.plan is not None
        posts = {place.address.post for place in self.plan.places}
        chosen: dict[Which, Callable[[Any, Any], bool]] = {
            "all": lambda own, peer: True,
            "post": lambda own, peer: own[1] in posts or peer[1] in posts,
            "group": lambda own, peer: own[1] not in posts and peer[1] not in posts,
        }
        return cut_between(self._processes[member].pid, [self._processes[other].pid], chosen[which])

    @property
    def plan(self) -> Plan | None:
        return self._control.formed

    @property
    def said(self) -> list[str]:
        return self._crew.said

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
                    if self._keeper is not None:
                        self._keeper.protect(plan)
                    self._handle(GenerationCreated(generation=plan.generation))
                case SendPlan(member=member, plan=plan):
                    if member in self._pipes:
                        self._pipes[member].send(plan)
                case TakeInventory(asked=asked, ended=ended):
                    self._take_inventory(asked, ended)
                case Say(text=text):
                    self._crew.said.append(text)
                case End():
                    self._crew.end = instruction

    def _take_inventory(self, asked: int, ended: tuple[int, ...]) -> None:
        assert self._keeper is not None
        for member in ended:
            self._processes[member].join()
        self._handle(self._keeper.inventory(asked))

    def _spawn(self, member: int) -> None:
        ours, theirs = self._context.Pipe()
        job = pickle.dumps((self._function, self._args))
        process = self._context.Process(
            target=_rank, args=(theirs, member, self._workers, job, self._folder), daemon=True
        )
        process.start()
        theirs.close()
        self._processes[member], self._pipes[member] = process, ours


def _rank(pipe: Connection, number: int, workers: tuple[int, int], job: bytes, folder: Path | None) -> None:
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
        secret=SECRET,
        ip="127.0.0.1",
        words=words,
        store=store,
        store_port=int(store.port),
        tell=tell,
        tell_at_last=tell,
        folder=folder,
    )
    snapshots = None if folder is None else _snapshots(folder, number)
    member = Member(
        host, workers=workers, reduction="exact", threads=1, device=torch.device("cpu"), snapshots=snapshots
    )
    threading.Thread(target=_train, args=(member, tell, job), daemon=True).start()
    try:
        while True:
            member.deliver(pipe.recv()) if pipe.poll(0.1) else member.telling.report()
    except (EOFError, ConnectionError, OSError):
        os._exit(0)


def _snapshots(folder: Path, number: int) -> Any:
    import torch

    from resilient.core.cadence import Cadence
    from resilient.snapshots import Snapshots

    return Snapshots(
        run="crew",
        attempt=1,
        folder=folder,
        member=number,
        device=torch.device("cpu"),
        cadence=Cadence(every=1, budget=0.02),
        say=print,
    )


def _train(member: Any, tell: Any, job: bytes) -> None:
    from resilient.run import Run

    function, args = pickle.loads(job)
    try:
        run = Run(member, seed=0, device=member.device)
        value = function(run, *args)
        run.check_left_in_order()
        tell(("value", value))
        member.telling.returned(run.digest())
    except BaseException:  # noqa: BLE001  the thread's edge
        member.telling.failed(member.step, traceback.format_exc())
