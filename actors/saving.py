"""Makes a node's snapshots durable: writes those that are meant to be, and commits a checkpoint when all nodes have.

    protected --> written: each keeper its ranks' shards --> committed, by the keeper of rank 0 --> old ones pruned
             \\--> given up after some tries; counted and told, and training has its slot back

What other keepers have written is seen on storage alone, and what this node's has done in its folder. It all happens
in a process of its own, see `actors.saver`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import xxhash

from actors.agenda import in_time, ordinal
from actors.holdings import Folder
from actors.ring import Ring
from actors.standing import read_standing, show_settled
from snapshot import store
from snapshot.arena import SlotError, SlotView
from snapshot.core.branches import Lineage
from snapshot.core.inventory import SnapshotKey
from snapshot.core.manifest import Manifest
from snapshot.files import Files, StorageError, open_files
from snapshot.manifests import folder_of

LATE_S = 10.0
"""So long a snapshot may take to be protected before it is written all the same."""
TRIES, FEW_TRIES = 10, 3
PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
"""Between tries, twice as long each time: about five minutes in all, as a throttling store may take."""
LASTING = (FileExistsError, FileNotFoundError, NotADirectoryError)
"""What time alone seldom mends, such as a bucket or a folder that is not there; few tries are made then."""
COMMIT_LIMIT_S = 1800.0
"""So long the others' shards are waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSpec:
    """run, node: whose snapshots. url: where to. keep: how many checkpoints. level: of zstd, None for none. token: this
    attempt's own."""

    run: str
    node: str
    url: str
    keep: int
    level: int | None
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveNews:
    """What has come of it so far. durable: the newest checkpoint that this keeper has committed."""

    durable: SnapshotKey | None = None
    committed: int = 0
    failures: int = 0
    unverified: int = 0
    """How often storage gave back other bytes than were written: that checkpoint is none, and older ones stay."""
    last_failure: str = ""
    stored_bytes: int = 0
    """Of the newest checkpoint."""
    took_s: float = 0.0
    """From seeing it complete here to its commit."""


@dataclass(slots=True)
class _Pending:
    """All shards of this node are on storage."""

    key: SnapshotKey
    lineage: Lineage
    folder: str
    seen_at: float
    tries: int = 0
    again_at: float = 0.0


class GivenUp(Exception):
    """The process is ending."""


class Saving:
    """One node's. Its methods are called by one thread."""

    def __init__(
        self,
        spec: SaveSpec,
        folder: Path,
        *,
        closing: threading.Event,
        open_files: Callable[[str], Files] = open_files,
    ) -> None:
        """folder: where the ranks' slots are, and what their keeper writes down. closing: set when all is to end."""
        self.news = SaveNews()
        self._spec = spec
        self._path = folder
        self._folder = Folder(folder, spec.run, spec.node)
        self._closing = closing
        self._open_files = open_files
        self._files: Files | None = None
        self._first_seen: dict[SnapshotKey, float] = {}
        self._tries: dict[SnapshotKey, int] = {}
        self._again_at = 0.0
        """Before, nothing is written."""
        self._newest_done: SnapshotKey | None = None
        self._pending: _Pending | None = None
        self._known: store.Known = {}
        self._others: set[str] = set()
        """Runs that write to the same place, as has been said."""

    def turn(self) -> bool:
        """Do what there is to do now. Whether nothing is left to be made durable. Raises GivenUp."""
        now, found = time.monotonic(), self._to_write()
        for key in sorted(found, key=in_time):
            seen_at = self._first_seen.setdefault(key, now)
            if (self._is_protected(key) or now - seen_at > LATE_S) and time.monotonic() >= self._again_at:
                self._write(key, *found[key])
        if not found:
            self._give_up_torn(now)
        if self._pending is not None and now >= self._pending.again_at:
            self._commit(self._pending)
        return self._pending is None and not self._to_write()

    def _is_protected(self, key: SnapshotKey) -> bool:
        return read_standing(self._path, key.generation).protected >= key.step

    def _to_write(self) -> dict[SnapshotKey, tuple[Ring, Mapping[int, SlotView]]]:
        self._folder.learn_rings()
        complete = self._folder.complete()
        wanted = self._folder.slots.durable()
        return {key: found for key, found in complete.items() if key in wanted and found[1] and self._is_new(key)}

    def _give_up_torn(self, now: float) -> None:
        """Nothing is complete. A rank of this node may have died before its share was captured: then a later generation
        goes on, nobody completes that snapshot, and the other ranks keep their slots of it until they are told."""
        newest = max(self._folder.rings, default=-1)
        for key in sorted(self._folder.slots.durable(), key=in_time):
            if key.generation < newest and self._is_new(key) and now - self._first_seen.setdefault(key, now) > LATE_S:
                self._count(f"{key} is given up: a rank has died before its share was captured")
                self._finished_writing(key)

    def _is_new(self, key: SnapshotKey) -> bool:
        return self._newest_done is None or in_time(key) > in_time(self._newest_done)

    def _write(self, key: SnapshotKey, ring: Ring, slots: Mapping[int, SlotView]) -> None:
        try:
            for _, view in sorted(slots.items()):
                view.seal()
                store.write_shard(
                    self._storage(),
                    token=self._spec.token,
                    head=view.head(),
                    payload=view.payload,
                    sums=view.sums(),
                    compression=self._spec.level,
                    pause=self._pause,
                )
        except GivenUp:
            raise
        except Exception as error:  # noqa: BLE001  an unforeseen one too: training waits for its slot
            self.news = replace(self.news, unverified=self.news.unverified + isinstance(error, store.NotAsWritten))
            self._failed(key, error)
            return
        if 0 in slots:
            if self._pending is not None:
                self._count(f"{self._pending.key}: the next was due before other nodes had written their shards")
            folder = folder_of(self._spec.run, key.attempt, key.branch, key.step, key.generation, self._spec.token)
            self._pending = _Pending(key, Lineage(branches=ring.branches), folder, self._first_seen[key])
        self._finished_writing(key)

    def _failed(self, key: SnapshotKey, error: Exception) -> None:
        tries = self._tries[key] = self._tries.get(key, 0) + 1
        passing = isinstance(error, StorageError) and not isinstance(error.__cause__, LASTING)
        over = tries >= (TRIES if passing else FEW_TRIES) or isinstance(error, SlotError)
        self._count(f"{key} could not be written{', and is given up' if over else ''} (try {tries}): {error}")
        if over:
            self._finished_writing(key)
        else:
            self._again_at = time.monotonic() + pause_s(tries, self._spec.node)

    def _finished_writing(self, key: SnapshotKey) -> None:
        """With success or without."""
        self._newest_done = key
        self._tries.clear()
        self._again_at = 0.0
        self._first_seen.clear()
        show_settled(self._path, ordinal(key))

    def _commit(self, pending: _Pending) -> None:
        try:
            manifest = store.commit(self._storage(), pending.folder, lineage=pending.lineage, saved_at=_now())
        except ValueError as error:  # the shards don't fit together, and never will
            self._pending = None
            self._count(f"{pending.key} could not be committed: {error}")
            return
        except Exception as error:  # noqa: BLE001  an unforeseen one too: what was written may be committed yet
            manifest = None
            self._count(f"{pending.key} could not be committed: {error}")
            pending.tries += 1
            pending.again_at = time.monotonic() + pause_s(pending.tries, self._spec.node)
        if manifest is not None:
            self._committed(pending, manifest)
            self._pending = None
        elif time.monotonic() - pending.seen_at > COMMIT_LIMIT_S:
            self._pending = None
            self._count(f"{pending.key}: other nodes have not written their shards")

    def _committed(self, pending: _Pending, manifest: Manifest) -> None:
        self.news = replace(
            self.news,
            durable=pending.key,
            committed=self.news.committed + 1,
            stored_bytes=manifest.stored_bytes,
            took_s=time.monotonic() - pending.seen_at,
        )
        try:
            attempt, token = pending.key.attempt, self._spec.token
            store.prune(
                self._storage(), self._spec.keep, run=self._spec.run, attempt=attempt, token=token, known=self._known
            )
            for other in sorted(store.other_runs(self._storage(), self._spec.run) - self._others):
                self._others.add(other)
                self._count(store.also_there(self._spec.url, other))
        except Exception as error:  # noqa: BLE001  an unforeseen one too: the next tries again
            self._count(f"old checkpoints could not be removed: {error}")

    def _count(self, what: str) -> None:
        self._files = None  # opened anew: there may be other credentials by now
        self.news = replace(self.news, failures=self.news.failures + 1, last_failure=what)

    def _storage(self) -> Files:
        if self._files is None:
            self._files = self._open_files(self._spec.url)
        return self._files

    def _pause(self) -> None:
        if self._closing.is_set():
            raise GivenUp


def pause_s(tries: int, node: str) -> float:
    """How long to wait after so many tries have failed; each node a little longer or shorter, so that not all come at
    once."""
    spread = 0.75 + xxhash.xxh3_64_intdigest(f"{node} {tries}".encode()) / 2**65
    return min(PAUSE_S * 2.0 ** (tries - 1), LONGEST_PAUSE_S) * spread


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
