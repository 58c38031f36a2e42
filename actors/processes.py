"""Processes that are known by more than their number, and signals that hit no other.

A record names a process by its id and start time, and says where that id counts: boot and pid namespace. Containers
may share a folder and not their ids; what lives in another namespace is known by the lock that it holds.

A process id can be taken by a later process between a look and a signal. So the pidfd is opened first, the start time
is compared then, and the signal goes through the pidfd.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

END_LIMIT_S = 10.0

_held: dict[Path, int] = {}
"""Descriptors of this process's locks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A process that was alive when it was opened."""

    pid: int
    pidfd: int

    def send(self, sign: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, sign)


def process_stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_stopped(pid: int) -> bool:
    """Whether the kernel shows the process as stopped, by a signal or by a debugger."""
    shown = process_stat(pid)
    return bool(shown) and shown[0] in "Tt"


def started_at(pid: int) -> str:
    """When the process was started, in the kernel's clock ticks. Empty if there is none."""
    shown = process_stat(pid)
    return shown[19] if shown else ""


@functools.cache
def place() -> str:
    """Where this process's ids count: boot and pid namespace."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return "unknown unknown"


def record_process(path: Path, pid: int) -> None:
    """Whole at any moment: a record that is half written looks like that of a dead process."""
    being_written = path.with_name(f".{path.name}")
    being_written.write_text(f"{pid} {started_at(pid)} {place()}")
    being_written.replace(path)


def recorded_process(path: Path) -> int | None:
    """The recorded process, if it still runs and its id counts here."""
    with opened(path) as process:
        return process.pid if process is not None else None


def still_runs(path: Path) -> bool:
    """Whether the recorded process runs, here or in another pid namespace."""
    return recorded_process(path) is not None or lives_elsewhere(path)


def lives_elsewhere(path: Path) -> bool:
    """Whether the recorded process runs in another pid namespace: it can't be seen, but it holds its lock."""
    record = _read(path)
    return record is not None and record[2] != place() and _is_locked(path.with_suffix(".lock"))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Opened | None]:
    """The recorded process, or None if it doesn't run, or not here."""
    record = _read(path)
    if record is None or record[2] != place():
        yield None
        return
    with opened_pid(record[0]) as process:
        shown = process_stat(record[0]) if process is not None else []
        yield process if shown and shown[19] == record[1] and shown[0] != "Z" else None


@contextlib.contextmanager
def opened_pid(pid: int) -> Iterator[Opened | None]:
    """Whichever process has this id now; None if none has."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield Opened(pid=pid, pidfd=pidfd)
    finally:
        os.close(pidfd)


def send_signal(process: psutil.Process, sign: signal.Signals) -> None:
    """To this process and to none that has its id by now."""
    with opened_pid(process.pid) as found:
        if found is not None and process.is_running():
            found.send(sign)


def end_process(path: Path) -> bool:
    """Kill the recorded process and wait until it has ended. False if it lives where no signal reaches it."""
    with opened(path) as process:
        if process is not None:
            process.send(signal.SIGKILL)
            select.select([process.pidfd], [], [], END_LIMIT_S)
    return not lives_elsewhere(path)


def hold_lock(record: Path) -> None:
    """Show by a lock beside the record, until this process ends, that it lives. Its children don't hold it."""
    path = record.with_suffix(".lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    if path in _held and os.path.sameopenfile(_held[path], descriptor):
        os.close(descriptor)
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # who looks whether it is locked holds it for a moment
    _held[path] = descriptor


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _read(path: Path) -> tuple[int, str, str] | None:
    """(pid, start time, place). Records of older versions say no place: they count here."""
    try:
        pid, started, *where = path.read_text().split()
        return int(pid), started, " ".join(where) or place()
    except (OSError, ValueError):
        return None


def _let_go() -> None:
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
