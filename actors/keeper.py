"""The keeper: one process per node that watches the node's ranks and speaks for them.

It learns of a local death from the kernel (pidfd) in well under a millisecond, reads the ranks' status
words, and sends heartbeats. It kills what the controller has declared dead. It outlives the ranks, but
not the run: without a controller its lease ends, and then it ends every rank it has watched.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from .folders import own, still_owned, sweep
from .lease import Lease
from .lifeline import Lifeline
from .notice import LeaveAsked, Notice
from .priority import raise_priority
from .processes import is_stopped, opened, record_process
from .remark import Remark
from .words import read_words

SWEEP_EVERY_S = 5.0
LAST_WORDS_LIMIT_S = 2.0


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
    snapshots: bool = False
    linger_s: float = 0.0
    """How long snapshots are kept when the run has ended without finishing."""
    save: Any = None
    """A SaveSpec, if some are to be made durable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What the keeper sees of one rank."""

    member: int
    alive: bool
    stopped: bool
    activity: str
    work: int
    longest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperAnswer:
    """A keeper's answer to the controller's question `asked`: its inventory, or that it has done its part."""

    asked: int
    phase: str
    node: str
    inventory: Any = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """All that a keeper had to make durable is so, or has been given up. Who is let go then does not beat again."""

    node: str
    incarnation: int
    news: Any
    """SaveNews, or None where nothing is made durable."""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotBegun:
    """A keeper could not begin, and its process ends."""

    node: str
    incarnation: int
    why: str


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
        self._notice = Notice(self._ask_to_leave)
        self._watched: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._lease = Lease(spec.lease_s)
        self._lingering = False
        self._lifeline = Lifeline(f"keeper 0 {spec.node}", spec.secret)
        self._poll = select.poll()
        self._wake_read, self._wake_write = os.pipe()
        self._poll.register(self._wake_read, select.POLLIN)
        try:
            self._settle(Path(spec.folder))
        except Exception as error:  # the process's edge: without a keeper nobody would say why the node is not used
            why = f"{type(error).__name__}: {error}"
            with contextlib.suppress(RayError):
                told = controller.hear.remote((NotBegun(node=spec.node, incarnation=spec.incarnation, why=why),))
                ray.get(told, timeout=LAST_WORDS_LIMIT_S)
            raise
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _settle(self, folder: Path) -> None:
        own(folder, self._spec.linger_s)
        self._adopt()
        self._keeping: Any = self._keep_snapshots(folder) if self._spec.snapshots else None
        self._sweep_others()

    def watch(self, member: int, pid: int) -> None:
        """Called by a rank as the first thing it does, so the process id is certainly its own."""
        self._hold(member, pid, os.pidfd_open(pid))
        record_process(Path(self._spec.folder) / f"rank-{member}.process", pid)
        os.write(self._wake_write, b"w")

    def _adopt(self) -> None:
        """Take over the ranks of a keeper that died before this one was started in its place."""
        for record in sorted(Path(self._spec.folder).glob("rank-*.process")):
            member = int(record.stem.partition("-")[2])
            with opened(record) as process:
                if process is not None:
                    self._hold(member, process.pid, os.dup(process.pidfd))
            self._watched.setdefault(member, _Watched(0, -1, alive=False))

    def _keep_snapshots(self, folder: Path) -> Any:
        from .keeping import Keeping

        spec, ip = self._spec, ray.util.get_node_ip_address()
        keeping = Keeping(key=spec.key, node=spec.node, folder=folder, secret=spec.secret, ip=ip, save=spec.save)
        if keeping.tally().codec != "isal":
            text = f"node {spec.node[:8]} has no ISA-L: parity is computed by NumPy, a hundred times slower"
            self._controller.hear.remote((Remark(text=text),))
        return keeping

    def _hold(self, member: int, pid: int, pidfd: int) -> None:
        with self._lock:
            self._watched[member] = _Watched(pid, pidfd)
            self._poll.register(pidfd, select.POLLIN)

    def _sweep_others(self, at_least_s: float = 0.0) -> None:
        folder = Path(self._spec.folder)
        sweep(folder.parent, self._keeping.folders if self._keeping else (folder,), at_least_s)

    def kill(self, member: int) -> None:
        """End a rank for good. SIGKILL also ends what is stopped."""
        with self._lock, contextlib.suppress(ProcessLookupError):  # its descriptor is closed under the lock, too
            watched = self._watched.get(member)
            if watched is not None and watched.alive:
                signal.pidfd_send_signal(watched.pidfd, signal.SIGKILL)

    def renew(self, lifeline: tuple[str, int], known_dead: tuple[int, ...] = ()) -> None:
        """The controller lives, and has on record that these ranks have ended: nobody will ask for them again."""
        self._lease.renew()
        self._lifeline.hold(lifeline)
        for member in known_dead:
            self._forget(member)

    def _forget(self, member: int) -> None:
        with self._lock:
            if member not in self._watched or self._watched[member].alive:
                return
            del self._watched[member]
        for what in ("process", "lock", "words"):
            (Path(self._spec.folder) / f"rank-{member}.{what}").unlink(missing_ok=True)

    def linger(self) -> None:
        """The run is over, and has not finished: end its ranks, and keep the snapshots for a while."""
        self._lingering = True
        os.write(self._wake_write, b"l")

    def _ask_to_leave(self, left_s: float) -> None:
        """The whole node is to."""
        ask = LeaveAsked(node=self._spec.node, member=0, why="its keeper was sent SIGTERM", left_s=left_s)
        self._controller.hear.remote((ask,))

    def process(self) -> int:
        return os.getpid()

    # Snapshots; only called where there are some

    def protect(self, ring: Any, peers: dict[str, tuple[str, int]]) -> None:
        self._keeping.protect(ring, peers)

    def take_inventory(self, asked: int, ended: tuple[int, ...]) -> None:
        for member in ended:
            self.kill(member)
        self._keeping.take_inventory(ended, self._is_alive, functools.partial(self._answer, asked, "inventory"))

    def rebuild(self, asked: int, phase: str, elected: Any, peers: dict[str, tuple[str, int]]) -> None:
        self._keeping.rebuild(phase, elected, peers, functools.partial(self._answer, asked, phase))

    def finish_saving(self) -> None:
        self._keeping.finish_saving(self._saved)

    def _saved(self, error: str = "") -> None:
        spec = self._spec
        saved = Saved(node=spec.node, incarnation=spec.incarnation, news=self._keeping.save_news, error=error)
        self._controller.hear.remote((saved,))

    def _answer(self, asked: int, phase: str, inventory: Any = None, error: str = "") -> None:
        answer = KeeperAnswer(asked=asked, phase=phase, node=self._spec.node, inventory=inventory, error=error)
        self._controller.hear.remote((answer,))

    def _is_alive(self, member: int) -> bool:
        watched = self._all_watched().get(member)
        return watched is not None and watched.alive

    def clean_up(self, patience_s: float = 0.0) -> None:
        """End all ranks, those that do not end by themselves soon enough by force, and leave nothing behind;
        the caller ends this process."""
        deadline = time.monotonic() + patience_s
        while any(watched.alive for watched in self._all_watched().values()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for member in self._all_watched():
            self.kill(member)
        folders = (Path(self._spec.folder),)
        if self._keeping is not None:
            self._keeping.close()
            folders = self._keeping.folders
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _watch(self) -> None:
        swept_at = time.monotonic()
        while True:
            events = self._poll.poll(self._spec.beat_s * 1000)
            for descriptor, _ in events:
                if descriptor == self._wake_read:
                    os.read(self._wake_read, 4096)
                else:
                    self._ended(descriptor)
            if self._lease.expired() or self._lingering:
                self._linger()
                self.clean_up()
                os._exit(0)
            if time.monotonic() - swept_at > SWEEP_EVERY_S:
                swept_at = time.monotonic()
                still_owned(Path(self._spec.folder))
                if self._keeping is not None:
                    self._keeping.sweep(self._is_alive)
                self._sweep_others(self._spec.lease_s)  # of raylets that have died on this machine
            vault = self._keeping.address if self._keeping is not None else None
            saved = self._keeping.save_news if self._keeping is not None else None
            self._controller.beat.remote(self._spec.node, self._spec.incarnation, self._pulses(), vault, saved)

    def _linger(self) -> None:
        """Keep the snapshots for a while: the run may be submitted again. The next attempt's keeper ends this."""
        for member in self._all_watched():
            self.kill(member)
        if self._keeping is not None:
            time.sleep(self._spec.linger_s)

    def _ended(self, pidfd: int) -> None:
        with self._lock:
            self._poll.unregister(pidfd)
            for watched in self._watched.values():
                if watched.pidfd == pidfd:
                    watched.alive, watched.pidfd = False, -1
            os.close(pidfd)

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
