"""A run's folder on a node: whose it is, who takes it over, and when it is swept.

The keeper's process id and start time are written into it, and each rank's. Shared memory outlives
processes, so a later attempt of the same run takes over what an earlier one has left, once every process
that could still write there has certainly ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

OWNER = "keeper.process"
LINGERS = "keeper.lingers"
"""How long the folder is to be kept after its keeper's end, in seconds."""
END_LIMIT_S = 10.0


def started_at(pid: int) -> str:
    """When the process was started, in the kernel's clock ticks: with it a process id is never mistaken for
    that of a later process. Empty if there is none."""
    shown = process_stat(pid)
    return shown[19] if shown else ""


def process_stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def record_process(path: Path, pid: int) -> None:
    path.write_text(f"{pid} {started_at(pid)}")


def recorded_process(path: Path) -> int | None:
    """The recorded process, if it still runs."""
    try:
        pid, started = path.read_text().split()
    except (OSError, ValueError):  # gone, or being written
        return None
    shown = process_stat(int(pid))
    return int(pid) if shown and shown[19] == started and shown[0] != "Z" else None


def own(folder: Path, linger_s: float) -> None:
    """Take the folder over for good: a former owner that nobody could reach, and that was taken for dead, would remove
    it when its lease ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the folder {folder} can't be made ({error.strerror}): Snapshot(directory=...) is a folder in memory that "
            "Ray's user may write to on every node, such as /dev/shm"
        ) from error
    if recorded_process(folder / OWNER) != os.getpid():
        _end_process(folder / OWNER)
    (folder / LINGERS).write_text(str(linger_s))
    record_process(folder / OWNER, os.getpid())


def still_owned(folder: Path) -> None:
    """From time to time: how long the folder lingers counts from its keeper's end, not from its beginning."""
    with contextlib.suppress(FileNotFoundError):  # a host that is taken for dead has had its memory cleared
        os.utime(folder / OWNER)


def earlier_attempts(folder: Path, run: str, attempt: int, node: str) -> tuple[Path, ...]:
    """Folders that earlier attempts of this run have left here, taken over for good: their processes are
    ended. Those of other nodes (of this machine, before its raylet was restarted) only if nobody owns them."""
    taken = []
    pattern = re.compile(re.escape(run) + r"-(\d+)-([0-9a-f]+)")
    for other in sorted(folder.parent.iterdir()):
        found = pattern.fullmatch(other.name)
        if found is None or int(found[1]) >= attempt:
            continue
        mine = found[2] == node[: len(found[2])]
        if mine or recorded_process(other / OWNER) is None:
            end_processes(other)
            taken.append(other)
    return tuple(taken)


def end_processes(folder: Path) -> None:
    """Kill everything that is on record in this folder, and wait until it has ended."""
    for record in [*folder.glob("rank-*.process"), folder / OWNER]:
        _end_process(record)


def _end_process(record: Path) -> None:
    pid = recorded_process(record)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], END_LIMIT_S)
            os.close(pidfd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A folder of an attempt whose processes on this node have all ended."""

    folder: Path
    nbytes: int
    """What it takes, as far as its files can be read."""
    ended_s: float
    """Seconds since its keeper's end."""
    lingers_s: float
    """How long it is kept from then on, for the run to be submitted again."""


def leftovers(folders: Path, keep: tuple[Path, ...] = ()) -> list[Leftover]:
    """By name; without those to `keep`."""
    found = []
    for owner in sorted(folders.glob(f"*/{OWNER}")):
        records = [owner, *owner.parent.glob("rank-*.process")]
        if owner.parent in keep or any(recorded_process(record) is not None for record in records):
            continue  # of a keeper that died alone the ranks live on, and the next one needs what it left
        with contextlib.suppress(OSError, ValueError):  # another keeper sweeps too, or it is not ours to read
            left = Leftover(
                folder=owner.parent,
                nbytes=sum(512 * file.stat().st_blocks for file in owner.parent.rglob("*")),
                ended_s=time.time() - owner.stat().st_mtime,
                lingers_s=float((owner.parent / LINGERS).read_text()),
            )
            found.append(left)
    return found


def sweep(folders: Path, keep: tuple[Path, ...] = (), at_least_s: float = 0.0) -> list[Leftover]:
    """Remove what keepers have left that were killed together with their host's processes. What was removed.

    at_least_s: so long it is left for another keeper to take over in any case.
    """
    over = [left for left in leftovers(folders, keep) if left.ended_s > max(left.lingers_s, at_least_s)]
    for left in over:
        shutil.rmtree(left.folder, ignore_errors=True)
    return [left for left in over if not left.folder.exists()]
