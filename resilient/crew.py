"""Ranks of a run as processes of this machine, without Ray, under the controller's own state machine in this process.

Ranks are `resilient.member.Member`s, connected by real sockets; facts and instructions travel over pipes. All of them
are on one node. A process starts within milliseconds, since it is forked from one that has imported everything.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol, TypeAlias

from .core.control import Control
from .core.events import (
    Event,
    GenerationCreated,
    InventoryTaken,
    NodeSeen,
    RankFailed,
    RankGone,
    RankLeaving,
    RankReady,
    RankReported,
    RankReturned,
    Tick,
)
from .core.instructions import CreateGeneration, End, Kill, Say, SendPlan, Spawn, TakeInventory
from .core.limits import Limits
from .core.plan import Plan

NODE, HOST = "node", "127.0.0.1"
TRAINING = "training"
"""The thread in which a rank runs the training function."""
TICK_S = 0.1
_EVENTS = (RankReady, RankReported, RankReturned, RankFailed)

_PRELOADED = ("resilient.member", "resilient.run", "resilient.worker", "torch._dynamo")
"""torch.optim imports the last when the first optimizer is made, which takes most of a second."""

Tell: TypeAlias = Callable[..., None]
"""Sends messages to the parent. Any thread may call it."""


class Processes:
    """Children with a pipe to each. Whatever happens, `close` ends all of them."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*_PRELOADED, *preload])
        self._pipes: dict[int, Connection] = {}
        self.all: dict[int, Any] = {}

    def start(self, number: int, target: Callable[..., None], *args: Any) -> None:
        """target: called with its end of the pipe, the number, and these."""
        ours, theirs = self._context.Pipe()
        # No daemon: those may have no children, and data loaders have some.
        process = self._context.Process(target=_child, args=(target, theirs, number, *args), daemon=False)
        with _without_main():
            process.start()
        theirs.close()
        self.all[number], self._pipes[number] = process, ours

    def send(self, number: int, message: object) -> None:
        """To a process that is there; what can't reach it counts for nothing."""
        if number in self._pipes:
            with contextlib.suppress(OSError):  # its end is noticed where messages are received
                self._pipes[number].send(message)

    def receive(self) -> Iterator[tuple[int, Any]]:
        """What has come by the next tick: by number a message, or None when the process has ended."""
        for pipe in wait(list(self._pipes.values()), TICK_S):
            number = next(number for number, each in self._pipes.items() if each is pipe)
            try:
                message = self._pipes[number].recv()
            except (EOFError, ConnectionError):
                self._pipes.pop(number).close()
                message = None
            yield number, message

    def kill(self, number: int) -> None:
        if number in self._pipes:
            self.all[number].kill()

    def close(self) -> None:
        for process in self.all.values():
            process.kill()
            process.join()
            process.close()
        for pipe in self._pipes.values():
            pipe.close()
        self.all, self._pipes = {}, {}


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A child would import the caller's script anew, and run what stands in it outside of functions."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What each rank does. Its functions can be imported.

    train: called in a thread with the member and a way to tell the parent; does not raise. member: makes a `Member` of
    its arguments. threads: of torch. begin: called first of all, with the rank's number. folder: for snapshots.
    """

    train: Callable[[Any, Tell], None]
    workers: tuple[int, int]
    member: Callable[..., Any] | None = None
    threads: int = 1
    begin: Callable[[int], None] | None = None
    folder: Path | None = None
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    """That they know each other by: other users of the machine reach their ports, too."""


class Keeper(Protocol):
    """What keeps snapshots of the ranks."""

    def protect(self, plan: Plan) -> None: ...

    def inventory(self, asked: int) -> InventoryTaken: ...

    def close(self) -> None: ...


class Crew:
    """The ranks, and the controller's state machine. Made for subclasses that override `heard` and `gone`."""

    def __init__(
        self, task: Task, limits: Limits, *, room: int, keeper: Keeper | None = None, preload: Sequence[str] = ()
    ) -> None:
        """room: for so many ranks at once."""
        self.processes = Processes(preload)
        self.control = Control(limits=limits)
        self.end: End | None = None
        self.plans: list[Plan] = []
        """All generations that were made."""
        self.said: list[str] = []
        """What the controller wants the user to read."""
        self._task, self._keeper, self._room = task, keeper, room

    def run(self, done: Callable[[], bool]) -> None:
        """Until that is so; asked after each tick."""
        self.room(self._room)
        while not done():
            for member, message in self.processes.receive():
                if message is None:
                    self.gone(member)
                    continue
                self.heard(member, message)
                if isinstance(message, _EVENTS):
                    self._handle(message)
            self._handle(Tick())

    def heard(self, member: int, message: Any) -> None:
        """A rank has sent this. Events are handled next."""

    def gone(self, member: int) -> None:
        """A rank's process has ended."""
        self._handle(RankGone(member=member, why="its process ended"))

    def close(self) -> None:
        self.processes.close()
        if self._keeper is not None:
            self._keeper.close()

    def room(self, ranks: int) -> None:
        """From now on the node has room for so many."""
        self._handle(NodeSeen(node=NODE, capacity=ranks))

    def ask_to_leave(self, member: int) -> None:
        self._handle(RankLeaving(member=member, why="it was asked to"))

    def kill(self, member: int) -> None:
        self.processes.kill(member)

    @property
    def plan(self) -> Plan | None:
        return self.control.formed

    def _handle(self, event: Event) -> None:
        for instruction in self.control.handle(event, time.monotonic()):
            match instruction:
                case Spawn(member=member):
                    self.processes.start(member, _rank, self._task)
                case Kill(member=member):
                    self.processes.kill(member)
                case CreateGeneration(plan=plan):
                    self.plans.append(plan)
                    if self._keeper is not None:
                        self._keeper.protect(plan)
                    self._handle(GenerationCreated(generation=plan.generation))
                case SendPlan(member=member, plan=plan):
                    self.processes.send(member, plan)
                case TakeInventory(asked=asked, ended=ended):
                    self._take_inventory(asked, ended)
                case Say(text=text):
                    self.said.append(text)
                case End():
                    self.end = instruction

    def _take_inventory(self, asked: int, ended: tuple[int, ...]) -> None:
        assert self._keeper is not None
        for member in ended:
            self.processes.all[member].join()
        self._handle(self._keeper.inventory(asked))


# In a child


def _child(target: Callable[..., None], *args: Any) -> None:
    multiprocessing.set_start_method(None, force=True)  # its own children start as they do everywhere else
    target(*args)


def teller(pipe: Connection) -> Tell:
    sending = threading.Lock()

    def tell(*messages: Any) -> None:
        with sending:
            for message in messages:
                pipe.send(message)

    return tell


def attend(pipe: Connection, deliver: Callable[[Any], None], report: Callable[[], None]) -> None:
    """Take in messages until the parent has gone: then this process ends."""
    try:
        while True:
            deliver(pipe.recv()) if pipe.poll(TICK_S) else report()
    except (EOFError, OSError):
        os._exit(0)


def _rank(pipe: Connection, number: int, task: Task) -> None:
    if task.begin is not None:
        task.begin(number)
    import torch

    from actors.group_store import GroupStoreServer

    from .member import Member

    torch.set_num_threads(task.threads)
    tell, store = teller(pipe), GroupStoreServer(HOST, task.secret)
    host: Any = SimpleNamespace(
        key="crew/1",
        member=number,
        node=NODE,
        secret=task.secret,
        ip=HOST,
        words=SimpleNamespace(moved=lambda *_: None, activity=lambda *_: None),
        store=store,
        store_port=store.port,
        tell=tell,
        tell_at_last=tell,
        folder=task.folder,
    )
    member = (task.member or Member)(
        host,
        workers=task.workers,
        reduction="exact",
        threads=task.threads,
        device=torch.device("cpu"),
        snapshots=None if task.folder is None else _snapshots(task.folder, number),
    )
    threading.Thread(target=task.train, args=(member, tell), name=TRAINING, daemon=True).start()
    attend(pipe, member.deliver, member.telling.report)


def _snapshots(folder: Path, number: int) -> Any:
    import torch

    from .core.cadence import Cadence
    from .snapshots import Snapshots

    return Snapshots(
        run="crew",
        attempt=1,
        folder=folder,
        member=number,
        device=torch.device("cpu"),
        cadence=Cadence(every=1, budget=0.02),
        say=print,
    )
