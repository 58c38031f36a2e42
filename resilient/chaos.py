"""The one place that knows how to break a run on this machine: which process is which, and how each dies.

Processes are found by their actors' names; each says its own process id. That is believed only of actors on
nodes of this host, and only if the process is one of Ray's. What `resilient.faults` has chosen is done here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors import launch
from actors.folders import home
from actors.processes import is_stopped, opened, process_stat, send_signal
from snapshot.arena import SlotError, SlotView, find_slots

from .cutting import cut_between
from .faults import Act, Seat, Seen

ANSWER_LIMIT_S = 10.0
END_LIMIT_S = 10.0
STOP_LIMIT_S = 2.0
SLOTS = "rank-*.slot-*"


class NotNow(Exception):
    """What was chosen can't be done at this moment: it has gone, or does not answer. Try again later."""


class Victim:
    """One run, seen as what can be done to it. A context: whatever it has stopped goes on after it.

    lose_node: ends a node of this machine, and returns how many processes that were; for whoever has started the
        cluster and keeps account of its nodes.
    """

    def __init__(self, run: str, lose_node: Callable[[str], int] | None = None) -> None:
        self._run = run
        self._lose_node = lose_node or self._end_node
        self._pids: dict[str, int] = {}
        """By actors' names, which are used once; but for the controller's."""
        self._stopped: dict[int, threading.Timer] = {}
        """By pidfd: what goes on later."""
        self._lock = threading.Lock()

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *exception: object) -> None:
        for pidfd in list(self._stopped):
            self._continue(pidfd)

    def look(self) -> Seen:
        """What there is now. Raises NotNow if the controller does not answer."""
        key, view = self._view()
        local, safe = local_nodes(), _not_to_be_killed()
        keepers = self._keepers(key)
        slots = [
            (node, found.path.name)
            for node in sorted(local)
            for found in find_slots(_folder(view, key, node), SLOTS)
            if found.state == "sealed"
        ]
        return Seen(
            seats=tuple(
                Seat(rank=seat["rank"], member=seat["member"], node=seat["node"])
                for seat in view["ranks"]
                if seat["node"] in local
            ),
            keepers=tuple(node for node in sorted(keepers) if node in local),
            nodes=tuple(node for node in sorted(local) if node not in safe and node in keepers),
            slots=tuple(slots),
            controller=True,
        )

    def do(self, act: Act) -> str:
        """Do it; what was done, in words. Raises NotNow if it has gone meanwhile."""
        key, view = self._view()
        match act.kind:
            case "kill":
                return f"process {self._kill([self._pid(f'{key}/rank/{act.seats[0].member}', 'Rank')])}"
            case "all":
                return f"processes {self._kill([self._pid(f'{key}/rank/{seat.member}', 'Rank') for seat in act.seats])}"
            case "stop":
                return self._stop(self._pid(f"{key}/rank/{act.seats[0].member}", "Rank"), act.stop_s)
            case "cut":
                pid, *others = (self._pid(f"{key}/rank/{seat.member}", "Rank") for seat in act.seats)
                return self._cut(pid, others)
            case "keeper":
                name = self._keepers(key).get(act.node)
                if name is None:
                    raise NotNow(f"there is no keeper on node {act.node[:8]}")
                return f"process {self._kill([self._pid(name, 'Keeper')])}"
            case "controller":
                return f"process {self._kill([self._pid(f'{key}/controller', 'Controller')])}"
            case "node":
                return f"{self._lose_node(act.node)} processes"
            case "corrupt":
                return corrupt(_folder(view, key, act.node), act.slot, act.at, act.bit)

    def _view(self) -> tuple[str, dict[str, Any]]:
        found = [name for name in launch.names(f"{self._run}/") if name.endswith("/controller")]
        newest = max(found, key=lambda name: int(name.split("/")[1]), default=None)
        if newest is None:
            raise NotNow(f"no run {self._run!r} is going on")
        return newest.removesuffix("/controller"), self._ask(newest, "look")

    def _ask(self, name: str, method: str) -> Any:
        handle = launch.find(name)
        if handle is None:
            raise NotNow(f"there is no {name}")
        try:
            return ray.get(getattr(handle, method).remote(), timeout=ANSWER_LIMIT_S)
        except (RayActorError, GetTimeoutError) as error:
            raise NotNow(f"{name} does not answer: {type(error).__name__}") from error

    def _keepers(self, key: str) -> dict[str, str]:
        """Names of the newest keepers, by node."""
        names = [name.removeprefix(f"{key}/keeper/").split("/") for name in launch.names(f"{key}/keeper/")]
        newest = sorted(names, key=lambda name: int(name[1]))
        return {node: f"{key}/keeper/{node}/{incarnation}" for node, incarnation in newest}

    def _pid(self, name: str, kind: str) -> int:
        if name not in self._pids:
            pid = int(self._ask(name, "process"))
            if not _is_actor(pid, kind):
                raise NotNow(f"process {pid}, as {name} calls itself, is no {kind} of Ray's on this machine")
            if kind == "Controller":
                return pid
            self._pids[name] = pid
        return self._pids[name]

    def _kill(self, pids: Sequence[int]) -> str:
        processes = [psutil.Process(pid) for pid in pids if _is_actor(pid, "")]
        if not processes:
            raise NotNow("it has ended meanwhile")
        end_at_once(processes)
        return ", ".join(str(process.pid) for process in processes)

    def _stop(self, pid: int, stop_s: float) -> str:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise NotNow("it has ended meanwhile") from error
        if not _is_actor(pid, ""):
            os.close(pidfd)
            raise NotNow("it has ended meanwhile")
        with self._lock:
            self._stopped[pidfd] = timer = threading.Timer(stop_s, self._continue, (pidfd,))
        _signal(pidfd, signal.SIGSTOP)
        timer.daemon = True
        timer.start()
        return f"process {pid} for {stop_s:.1f} s"

    def _cut(self, pid: int, others: list[int]) -> str:
        try:
            count = cut_between(pid, others)
        except (PermissionError, ProcessLookupError) as error:
            raise NotNow(f"the connections of process {pid} can't be cut: {error}") from error
        if not count:
            raise NotNow(f"process {pid} has no connection with the others")
        return f"{count} connections of process {pid}"

    def _continue(self, pidfd: int) -> None:
        """Once, whoever comes first."""
        with self._lock:
            timer = self._stopped.pop(pidfd, None)
        if timer is not None:
            timer.cancel()
            _signal(pidfd, signal.SIGCONT)
            os.close(pidfd)

    def _end_node(self, node: str) -> int:
        """The machine disappears, and its memory with it: its raylet is the parent of its actors."""
        key, view = self._view()
        name = self._keepers(key).get(node)
        if name is None:
            raise NotNow(f"there is no keeper on node {node[:8]} to find its raylet by")
        raylet = psutil.Process(self._pid(name, "Keeper")).parent()
        if raylet is None or raylet.name() != "raylet":
            raise NotNow(f"the parent of the keeper of node {node[:8]} is no raylet")
        victims = [*raylet.children(recursive=True), raylet]
        end_at_once(victims)
        forget_memory(str(home(view["memory"])), node)
        return len(victims)


def local_nodes() -> set[str]:
    """Live nodes of this host."""
    mine = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    here = {node["NodeManagerAddress"] for node in nodes if node["NodeID"] == mine}
    return {node["NodeID"] for node in nodes if node["NodeManagerAddress"] in here}


def _not_to_be_killed() -> set[str]:
    """The head, without which nothing is left, and the node that this process hangs on."""
    heads = {node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]}
    return heads | {ray.get_runtime_context().get_node_id()}


def end_at_once(processes: Iterable[psutil.Process]) -> None:
    """Kill them as if in one instant: none of them sees another one die. Waits until they are gone.

    Parents are to come last: the kernel wakes stopped children whose parent dies.
    """
    victims = list(processes)
    for sign in (signal.SIGSTOP, signal.SIGKILL):
        for process in victims:
            send_signal(process, sign)
    psutil.wait_procs(victims, timeout=END_LIMIT_S)


def forget_memory(folders: str, node: str) -> None:
    """A power cut takes what a node's runs have in memory."""
    for folder in Path(folders).glob(f"*-{node[:12]}"):
        shutil.rmtree(folder, ignore_errors=True)


def corrupt(folder: Path, slot: str, at: float, bit: int) -> str:
    """Flip one bit of a sealed image. Its rank stands still meanwhile, so that it can't have begun a new one:
    that would not have been summed yet, and nobody could ever find out. Raises NotNow if it has."""
    path = folder / slot
    with _standing_still(folder / f"{slot.partition('.')[0]}.process"):
        try:
            view = SlotView.open(path)
        except (SlotError, FileNotFoundError) as error:
            raise NotNow(f"{slot} has gone, or is damaged already") from error
        with contextlib.closing(view):
            try:
                sealed = view.sealed
            except SlotError as error:
                raise NotNow(f"{slot} is damaged already") from error
            if not sealed:
                raise NotNow(f"{slot} is being written anew")
            offset = int(at * len(view.image))
            _flip(path, offset, bit)
    return f"bit {bit} of byte {offset}"


def _flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)


@contextlib.contextmanager
def _standing_still(record: Path) -> Iterator[None]:
    """The recorded process does nothing within it."""
    with opened(record) as process:
        if process is None or is_stopped(process.pid):
            yield
            return
        try:
            process.send(signal.SIGSTOP)
            deadline = time.monotonic() + STOP_LIMIT_S
            while not is_stopped(process.pid) and process_stat(process.pid):
                if time.monotonic() > deadline:
                    raise NotNow(f"process {process.pid} could not be stopped")
                time.sleep(0.001)
            yield
        finally:
            process.send(signal.SIGCONT)


def _signal(pidfd: int, sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, sign)


def _is_actor(pid: int, kind: str) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        command = process.cmdline()
        return bool(command) and command[0].startswith(f"ray::{kind}") and process.status() != psutil.STATUS_ZOMBIE
    return False


def _folder(view: dict[str, Any], key: str, node: str) -> Path:
    return Path(launch.folder_of(key, node, view["memory"]))
