"""The keeper: one process per node that watches the node's ranks and speaks for them.

It learns of a local death from the kernel (pidfd) in well under a millisecond, reads the ranks' status
words, and sends heartbeats. It kills what the controller has declared dead. It outlives the ranks, but
not the run: without a controller its lease ends, and then it ends every rank it has watched.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lease import Lease
from .lifeline import Lifeline
from .priority import raise_priority
from .words import read_words

OWNER = "keeper.pid"
"""Which process a run's folder on this node belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperSpec:
    key: str
    node: str
    folder: str
    secret: str
    beat_s: float
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What the keeper sees of one rank."""

    member: int
    alive: bool
    stopped: bool
    activity: str
    work: int
    longest_s: float


@dataclass(slots=True)
class _Watched:
    pid: int
    pidfd: int
    alive: bool = True


class Keeper:
    def __init__(self, spec: KeeperSpec, controller: Any) -> None:
        raise_priority()
        self._spec = spec
        self._controller = controller
        self._watched: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._lease = Lease(spec.lease_s)
        self._lifeline = Lifeline(f"keeper 0 {spec.node}", spec.secret)
        self._poll = select.poll()
        self._wake_read, self._wake_write = os.pipe()
        self._poll.register(self._wake_read, select.POLLIN)
        _sweep(Path(spec.folder).parent)
        Path(spec.folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        (Path(spec.folder) / OWNER).write_text(str(os.getpid()))
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def watch(self, member: int, pid: int) -> None:
        """Called by a rank as the first thing it does, so the process id is certainly its own."""
        pidfd = os.pidfd_open(pid)
        with self._lock:
            self._watched[member] = _Watched(pid, pidfd)
            self._poll.register(pidfd, select.POLLIN)
        os.write(self._wake_write, b"w")

    def kill(self, member: int) -> None:
        """End a rank for good. SIGKILL also ends what is stopped."""
        with self._lock:
            watched = self._watched.get(member)
        if watched is not None and watched.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(watched.pidfd, signal.SIGKILL)

    def renew(self, lifeline: tuple[str, int]) -> None:
        self._lease.renew()
        self._lifeline.hold(lifeline)

    def process(self) -> int:
        return os.getpid()

    def clean_up(self) -> None:
        """End all ranks and leave nothing behind; the caller ends this process."""
        with self._lock:
            members = list(self._watched)
        for member in members:
            self.kill(member)
        shutil.rmtree(self._spec.folder, ignore_errors=True)

    def _watch(self) -> None:
        while True:
            events = self._poll.poll(self._spec.beat_s * 1000)
            for descriptor, _ in events:
                if descriptor == self._wake_read:
                    os.read(self._wake_read, 4096)
                else:
                    self._ended(descriptor)
            if self._lease.expired():
                self.clean_up()
                os._exit(0)
            self._controller.beat.remote(self._spec.node, self._pulses(), time.time())

    def _ended(self, pidfd: int) -> None:
        with self._lock:
            self._poll.unregister(pidfd)
            for watched in self._watched.values():
                if watched.pidfd == pidfd:
                    watched.alive = False

    def _pulses(self) -> tuple[Pulse, ...]:
        with self._lock:
            watched = list(self._watched.items())
        return tuple(self._pulse(member, process) for member, process in watched)

    def _pulse(self, member: int, process: _Watched) -> Pulse:
        words = read_words(Path(self._spec.folder) / f"rank-{member}.words")
        work, activity, _, _, longest_s = words or (0, "starting", 0, 0, 0.0)
        return Pulse(
            member=member,
            alive=process.alive,
            stopped=process.alive and is_stopped(process.pid),
            activity=activity,
            work=work,
            longest_s=longest_s,
        )


def _sweep(folder: Path) -> None:
    """Remove what keepers left that were killed together with their host's processes."""
    for owner in folder.glob(f"*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError):  # another keeper sweeps too, or it is not ours to read
            if not Path(f"/proc/{int(owner.read_text())}").exists():
                shutil.rmtree(owner.parent, ignore_errors=True)


def is_stopped(pid: int) -> bool:
    """Whether the kernel shows the process as stopped, by a signal or by a debugger."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] in "Tt"
