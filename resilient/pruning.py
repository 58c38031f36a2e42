"""Pruning by hand: what goes, what stays, and why."""

from __future__ import annotations

from dataclasses import dataclass

from snapshot.files import Files
from snapshot.store import INCOMPLETE, Found, checkpoints, prune


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """Of a checkpoint's folder."""

    folder: str
    complete: bool
    removed: bool
    why: str


def pruned_at(files: Files, keep: int, *, dry_run: bool) -> list[Fate]:
    """Oldest first; each run's by itself. Nothing of a run goes of which no checkpoint is complete.

    In the name of the submission that has completed the newest one, as its keepers prune: what a later attempt, or
    another submission of the same attempt, may still be writing stays.
    Raises ValueError, StorageError.
    """
    found = checkpoints(files)
    target: Files = _Untouched(files) if dry_run else files
    removed: set[str] = set()
    for run in {each.run for each in found if each.complete}:
        newest = [each.key for each in found if each.complete and each.run == run][-1]
        removed.update(prune(target, keep, run=run, attempt=newest.attempt, token=newest.token))
    return [_fate(each, removed, keep, [other for other in found if other.run == each.run]) for each in found]


def _fate(each: Found, removed: set[str], keep: int, found: list[Found]) -> Fate:
    gone = each.folder in removed
    return Fate(folder=each.folder, complete=each.complete, removed=gone, why=_why(each, gone, keep, found))


def _why(each: Found, gone: bool, keep: int, found: list[Found]) -> str:
    complete = [other.key for other in found if other.complete]
    those = "the newest" if keep == 1 else f"the newest {keep}"
    if gone:
        return f"older than {those}" if each.complete else "never completed, and nobody completes it any more"
    if each.complete and each.key in complete[-keep:]:
        return those if keep == 1 else f"one of {those}"
    if each.complete:
        return "of another submission of the same attempt"
    if each.why != INCOMPLETE:
        return f"can't be read: {each.why}"
    return "may still be being written"


class _Untouched:
    """Reads only: what removes does nothing."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.url, self.lanes = files.url, files.lanes
        self.names, self.size, self.read, self.read_into = files.names, files.size, files.read, files.read_into
        self.write, self.path, self.forget = files.write, files.path, files.forget

    def settle(self, name: str) -> None:
        pass

    def remove(self, name: str) -> None:
        pass

    def remove_folder(self, folder: str) -> None:
        pass
