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
    incarnation: int
    """Grows from one keeper of a node to the next; in every heartbeat."""
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
        self._adopt()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def watch(self, member: int, pid: int) -> None:
        """Called by a rank as the first thing it does, so the process id is certainly its own."""
        self._hold(member, pid)
        record = Path(self._spec.folder) / f"rank-{member}.process"
        record.write_text(f"{pid} {started_at(pid)}")
        os.write(self._wake_write, b"w")

    def _adopt(self) -> None:
        """Take over the ranks of a keeper that died before this one was started in its place."""
        for record in sorted(Path(self._spec.folder).glob("rank-*.process")):
            member = int(record.stem.partition("-")[2])
            pid, started = record.read_text().split()
            if started_at(int(pid)) == started:
                with contextlib.suppress(ProcessLookupError):
                    self._hold(member, int(pid))
            self._watched.setdefault(member, _Watched(int(pid), -1, alive=False))

    def _hold(self, member: int, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        with self._lock:
            self._watched[member] = _Watched(pid, pidfd)
            self._poll.register(pidfd, select.POLLIN)

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

    def clean_up(self, patience_s: float = 0.0) -> None:
        """End all ranks, those that do not end by themselves soon enough by force, and leave nothing behind;
        the caller ends this process."""
        deadline = time.monotonic() + patience_s
        while any(watched.alive for watched in self._all_watched().values()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for member in self._all_watched():
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
            self._controller.beat.remote(self._spec.node, self._spec.incarnation, self._pulses())

    def _ended(self, pidfd: int) -> None:
        with self._lock:
            self._poll.unregister(pidfd)
            for watched in self._watched.values():
                if watched.pidfd == pidfd:
                    watched.alive = False

    def _pulses(self) -> tuple[Pulse, ...]:
        return tuple(self._pulse(member, process) for member, process in self._all_watched().items())

    def _all_watched(self) -> dict[int, _Watched]:
        with self._lock:
            return dict(self._watched)

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
    shown = _stat(pid)
    return bool(shown) and shown[0] in "Tt"


def started_at(pid: int) -> str:
    """When the process was started, in the kernel's clock ticks: with it a process id is never mistaken for
    that of a later process. Empty if there is none."""
    shown = _stat(pid)
    return shown[19] if shown else ""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
