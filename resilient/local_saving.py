"""Checkpoints of a run in one process: written at once, between two steps, in the same format and by the same rules."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone

import torch
import xxhash

from actors.saving import pause_s
from snapshot import store
from snapshot.capture import capture
from snapshot.core.branches import Branch, Lineage
from snapshot.core.chunks import ends_within
from snapshot.core.ranges import merged
from snapshot.files import StorageError, open_files
from snapshot.load import load
from snapshot.manifests import folder_of
from snapshot.slot import SlotHead, chunk_sums
from snapshot.table import StateTable

from .checkpoints import first_attempt, to_resume
from .core.plan import first_branch
from .core.saves import Saves
from .errors import RunLost
from .job import Checkpoint
from .restoring import fetch_stored


class LocalSaving:
    """Raises ValueError for a URL that is of no use, and StorageError when storage fails at the start or at the end. In
    between that is said, and tried again at a later step."""

    def __init__(self, checkpoint: Checkpoint, run: str) -> None:
        self._checkpoint, self._run = checkpoint, run
        self._files = open_files(checkpoint.url, allow_memory=True)
        self._attempt = first_attempt(checkpoint, run, self._files)
        self._token = secrets.token_hex(4)
        self._saves = Saves(every_steps=checkpoint.every_steps, every_s=checkpoint.every_s)
        self._lineage = first_branch()
        self._known: store.Known = {}
        self._others: set[str] = set()
        """Runs that write to the same place, as has been said."""
        self._newest = 0
        """The step of the newest state that is on storage, or was gone on from."""
        self._whole: tuple[int, StateTable] | None = None
        """The state at the newest boundary: a copy, since the user's code may stop in the middle of a step."""
        self._payload = bytearray()
        self._tries, self._again_at = 0, 0.0

    def resume(self, objects: Mapping[str, object]) -> tuple[int, tuple[int, ...]]:
        """Give the objects the state to go on from. The step it is of, and what to leave out of the data; 0 and
        nothing if there is none. Raises RunLost if the step that was asked for is not there."""
        wanted = self._checkpoint.resume
        if wanted == "never":
            return 0, ()
        step = wanted if isinstance(wanted, int) else None
        found = to_resume(self._checkpoint, self._run, self._files, step)
        if found is None:
            if step is None:
                return 0, ()
            raise RunLost(f"resume={step}: there is no complete checkpoint of step {step} in {self._checkpoint.url}")
        url, one = found
        assert one.manifest is not None
        load(objects, fetch_stored(url, one.folder))
        self._lineage, self._newest = one.manifest.lineage, one.key.step
        return one.key.step, self._lineage.skipped

    def boundary(self, step: int, last_step: int | None, objects: Mapping[str, object]) -> None:
        """The state at the start of `step` stands."""
        self._whole = step, self._copied(capture(objects))
        self._saves.last_step = last_step
        now = time.monotonic()
        if self._saves.is_due(step, now) and now >= self._again_at:
            try:
                self.save_newest()
            except StorageError as error:
                self._tries += 1
                self._again_at = time.monotonic() + pause_s(self._tries, self._run)
                print(f"resilient: the checkpoint of step {step} is not written yet: {error}", file=sys.stderr)
            else:
                self._tries = 0
                self._saves.saved(step, time.monotonic())

    def save_newest(self) -> None:
        """The state of the last whole step goes to storage, if it is not there."""
        if self._whole is not None and self._whole[0] > self._newest:
            self._save(*self._whole)
            self._newest = self._whole[0]

    def _copied(self, table: StateTable) -> StateTable:
        """The bytes go into memory that is used again at each step."""
        size = len(table.skeleton) + table.nbytes
        if len(self._payload) != size:
            self._payload = bytearray(size)
        self._payload[: len(table.skeleton)] = table.skeleton
        room, at = torch.frombuffer(self._payload, dtype=torch.uint8), len(table.skeleton)
        for piece in table.pieces(0, table.nbytes):
            room[at : at + piece.numel()].copy_(piece)
            at += piece.numel()
        return table

    def left_out(self, step: int, skipped: tuple[int, ...]) -> None:
        """From this step on a new branch goes on, without these positions in the data, all that are skipped by now."""
        parent = self._lineage.newest.number
        more = tuple(position for position in skipped if position not in self._lineage.skipped)
        branch = Branch(number=parent + 1, parent=parent, at_step=step, skipped=more)
        self._lineage = Lineage(branches=(*self._lineage.branches, branch))

    def _save(self, step: int, table: StateTable) -> None:
        """table: as it was copied; of it only the layout counts."""
        ranges = merged([(0, table.nbytes)])
        ends = ends_within(table.chunk_ends(), ranges)
        head = SlotHead(
            run=self._run,
            attempt=self._attempt,
            branch=self._lineage.newest.number,
            generation=1,
            step=step,
            member=1,
            rank=0,
            world=1,
            ranges=ranges,
            state_bytes=table.nbytes,
            skeleton=xxhash.xxh3_128_hexdigest(table.skeleton),
            skeleton_bytes=len(table.skeleton),
            chunks=tuple(len(table.skeleton) + end for end in (0, *ends)),
            durable=True,
        )
        view, token = memoryview(self._payload).toreadonly(), self._token
        sums, level = chunk_sums(view, head), self._checkpoint.level
        store.write_shard(self._files, token=token, head=head, payload=view, sums=sums, compression=level)
        folder = folder_of(head.run, head.attempt, head.branch, step, head.generation, token)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        store.commit(self._files, folder, lineage=self._lineage, saved_at=now)
        store.prune(
            self._files, self._checkpoint.keep, run=self._run, attempt=self._attempt, token=token, known=self._known
        )
        for other in sorted(store.other_runs(self._files, self._run) - self._others):
            self._others.add(other)
            print(f"resilient: {store.also_there(self._checkpoint.url, other)}", file=sys.stderr)
