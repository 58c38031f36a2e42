"""A run's folder on a node: whose it is, who takes it over, and when it is swept.

Each user of a machine has a folder, and each run has one in it. Nobody else may enter them, and this is looked at
whenever one is used: what another user could write to says whom to kill, and is training state.

The keeper's process is on record in a run's folder, and each rank's. Shared memory outlives
processes, so a later attempt of the same run takes over what an earlier one has left, once every process
that could still write there has certainly ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from .moments import boot_s, since_stamp_s
from .processes import end_process, hold_lock, lives_elsewhere, record_process, recorded_process, still_runs

OWNER = "keeper.process"
LINGERS = "keeper.lingers"
"""How long the folder is to be kept after its keeper's end, in seconds."""
FORMER_HOME = "resilient"
"""The folder of all users of a machine, in older versions."""


def home(memory: str) -> Path:
    """This user's folder for runs. The name alone proves nothing: see `make_private`."""
    return Path(memory) / f"resilient-{os.geteuid()}"


def make_private(folder: Path) -> None:
    """Make the folder, if there is none, for this user alone. Raises OSError, with a remedy, if that is not so."""
    try:
        with contextlib.suppress(FileExistsError):  # whatever it is, it is looked at
            folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise OSError(
            f"the folder {folder} can't be made ({error.strerror}): Snapshot(directory=...) is a folder in memory that "
            "Ray's user may write to on every node, such as /dev/shm"
        ) from error
    if why := _why_not_private(folder):
        raise PermissionError(
            f"the folder {folder} {why}, so what is in it can't be trusted: remove it, or choose another place by "
            "Snapshot(directory=...); the folder must be one of user "
            f"{os.geteuid()} that nobody else may enter (mode 0700)"
        )


def _why_not_private(folder: Path, forbidden: int = 0o077) -> str:
    """Empty if only this user may use the folder. forbidden: permission bits that it must not have."""
    try:
        shown = folder.lstat()
    except OSError as error:
        return f"can't be looked at ({error.strerror})"
    if not stat.S_ISDIR(shown.st_mode):
        return "is a link" if stat.S_ISLNK(shown.st_mode) else "is no folder"
    if shown.st_uid != os.geteuid():
        return f"belongs to user {shown.st_uid}"
    open_to_others = shown.st_mode & forbidden
    return f"is open to others (mode {stat.S_IMODE(shown.st_mode):04o})" if open_to_others else ""


def _runs(folders: Path) -> list[Path]:
    """The runs' folders that are this user's alone, also where older versions kept them, by name."""
    former = folders.with_name(FORMER_HOME)
    trusted = [] if _why_not_private(folders) else [folders]
    if former != folders and not _why_not_private(former, 0o022):  # others could read it then
        trusted.append(former)
    found = [run for each in trusted for run in each.iterdir() if not _why_not_private(run)]
    return sorted(found, key=lambda run: run.name)


def own(folder: Path, linger_s: float) -> None:
    """Take the folder over for good: a former owner that nobody could reach, and that was taken for dead, would remove
    it when its lease ends."""
    make_private(folder.parent)
    make_private(folder)
    if recorded_process(folder / OWNER) != os.getpid() and not end_process(folder / OWNER):
        raise OSError(
            f"the folder {folder} belongs to a keeper that lives in another pid namespace, where it can't be ended: "
            "end that container, or choose another place by Snapshot(directory=...)"
        )
    hold_lock(folder / OWNER)
    (folder / LINGERS).write_text(str(linger_s))
    record_process(folder / OWNER, os.getpid())
    still_owned(folder)


def still_owned(folder: Path) -> None:
    """From time to time: how long the folder lingers counts from its keeper's end, not from its beginning."""
    with contextlib.suppress(FileNotFoundError):  # a host that is taken for dead has had its memory cleared
        os.utime(folder / OWNER, (boot_s(), boot_s()))


def earlier_attempts(folder: Path, run: str, attempt: int, node: str) -> tuple[Path, ...]:
    """Folders that earlier attempts of this run have left here, taken over for good: their processes are
    ended. Those of other nodes (of this machine, before its raylet was restarted) only if nobody owns them."""
    taken = []
    pattern = re.compile(re.escape(run) + r"-(\d+)-([0-9a-f]+)")
    for other in _runs(folder.parent):
        found = pattern.fullmatch(other.name)
        if found is None or int(found[1]) >= attempt:
            continue
        mine = found[2] == node[: len(found[2])]
        if (mine or not still_runs(other / OWNER)) and end_processes(other):
            taken.append(other)
    return tuple(taken)


def end_processes(folder: Path) -> bool:
    """Kill everything that is on record in this folder, and wait until it has ended. False, and nothing done, if some
    of it lives where it can't be ended."""
    records = [*folder.glob("rank-*.process"), folder / OWNER]
    if any(lives_elsewhere(record) for record in records):
        return False
    return all(end_process(record) for record in records)


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
    for owner in [run / OWNER for run in _runs(folders)]:
        records = [owner, *owner.parent.glob("rank-*.process")]
        if owner.parent in keep or any(still_runs(record) for record in records):
            continue  # of a keeper that died alone the ranks live on, and the next one needs what it left
        with contextlib.suppress(OSError, ValueError):  # another keeper sweeps too, or it is not ours to read
            left = Leftover(
                folder=owner.parent,
                nbytes=sum(512 * file.stat().st_blocks for file in owner.parent.rglob("*")),
                ended_s=since_stamp_s(owner.stat().st_mtime),
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
