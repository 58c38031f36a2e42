"""Durable checkpoints: how they come to storage, which there are, and which go.

    shard of each rank     .bin, read back, then (rank 0) skeleton.json, then the shard manifest: `write_shard`
    all shards there       manifest.json: `commit`. From here on it is a checkpoint, and no file of it changes
    too many               manifest.json goes first, then the rest: `prune`

Keepers write shards beside each other and never speak about it: what lies on storage is all that they know of each
other. One that takes over from a dead one writes the same again, under the same names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import xxhash

from snapshot.coding import Encoder
from snapshot.core.branches import Lineage
from snapshot.core.manifest import Manifest, ShardManifest
from snapshot.core.names import (
    MANIFEST,
    SKELETON,
    CheckpointKey,
    is_temporary,
    shard_file,
    shard_manifest,
    world_of,
)
from snapshot.core.spelling import ManifestError
from snapshot.files import Files, Part, StorageError, in_lanes
from snapshot.manifests import folder_of, read_manifest, read_shard, read_shards, read_skeleton
from snapshot.reading import RottenChunk, StoredShard
from snapshot.share import ShareParts, ahead, check_chunk
from snapshot.slot import RottenSlot, SlotHead

INCOMPLETE = "incomplete"
_SAME = tuple(name for name in SlotHead.__slots__ if name not in ("chunks", "durable"))


def write_shard(
    files: Files,
    *,
    token: str,
    head: SlotHead,
    payload: memoryview,
    sums: Sequence[int],
    compression: int | None = None,
    pause: Callable[[], None] = lambda: None,
) -> None:
    """Bring one rank's share to storage; nothing if it is there. Memory: a few MiB beside the payload.

    token: of this submission, see `CheckpointKey`. payload, sums: as sealed in the slot; the payload must not change.
    compression: zstd's level, or None to store chunks as they are. pause: called between pieces; it may wait, or
        raise to give up, which leaves nothing behind.
    A shard manifest is written only when the shard was read back as it was written: a checkpoint that is complete was
    verified once, by those who wrote it.
    Raises RottenSlot if a chunk is not what was sealed (then nothing is written that has a meaning), NotAsWritten, and
    StorageError.
    """
    assert len(payload) == head.payload_bytes and len(sums) == len(head.chunks), head
    folder = folder_of(head.run, head.attempt, head.branch, head.step, head.generation, token)
    manifest_name = shard_manifest(head.rank, head.world)
    there = files.names(folder)
    if MANIFEST in there or _is_written(files, folder, head, there):
        return
    if manifest_name in there:  # of other bytes: must not be taken for the manifest of these
        files.remove(f"{folder}/{manifest_name}")
    skeleton = payload[: head.skeleton_bytes]
    check_chunk(head, 0, skeleton, sums[0])
    if xxhash.xxh3_128_hexdigest(skeleton) != head.skeleton:
        raise RottenSlot(f"rank {head.rank}, step {head.step}: the skeleton's digest is not {head.skeleton}")
    parts = ShareParts(head, payload, sums, pause)
    file = shard_file(head.rank, head.world)
    source: Iterator[Part] = parts.plain() if compression is None else parts.packed(Encoder(compression))
    file_bytes = files.write(f"{folder}/{file}", ahead(source), at_most_bytes=head.share_bytes)
    if head.rank == 0:
        files.write(f"{folder}/{SKELETON}", [skeleton])
    same = {name: getattr(head, name) for name in _SAME}
    shard = ShardManifest(**same, token=token, file=file, file_bytes=file_bytes, chunks=tuple(parts.chunks))
    _read_back(files, f"{folder}/{file}", shard, pause)
    files.write(f"{folder}/{manifest_name}", [shard.to_bytes()])


class NotAsWritten(StorageError):
    """Storage has taken bytes, and gives back others."""


def _read_back(files: Files, file: str, shard: ShardManifest, pause: Callable[[], None]) -> None:
    stored = StoredShard(files, file, shard)
    files.forget(file)
    for run, _ in stored.runs(range(len(shard.chunks)), 0, shard.share_bytes):
        pause()
        try:
            for _, found in stored.read_coded(run):
                if isinstance(found, RottenChunk):
                    raise found
        except RottenChunk as bad:
            raise NotAsWritten(
                f"{files.url}/{file}: read back right after it was written, chunk {bad.number} is another: {bad}"
            ) from bad


def _is_written(files: Files, folder: str, head: SlotHead, there: Sequence[str]) -> bool:
    if not {shard_manifest(head.rank, head.world), shard_file(head.rank, head.world)} <= set(there):
        return False
    if head.rank == 0 and SKELETON not in there:
        return False
    try:
        shard, _ = read_shard(files, folder, head.rank, head.world)
    except (ManifestError, FileNotFoundError):
        return False
    ends = tuple(head.skeleton_bytes + chunk.end for chunk in shard.chunks)
    return (head.skeleton_bytes, *ends) == head.chunks and all(
        getattr(shard, name) == getattr(head, name) for name in _SAME
    )


def commit(files: Files, folder: str, *, lineage: Lineage, saved_at: str) -> Manifest | None:
    """Make a checkpoint of a folder in which all shards are; None as long as one is missing.

    lineage: all branches of the run. saved_at: when, in ISO 8601, for people.
    Idempotent. Raises ManifestError if the shards don't fit together, and StorageError.
    """
    key = CheckpointKey.of_folder(folder)
    assert key is not None, folder
    names = set(files.names(folder))
    if MANIFEST in names:
        files.settle(f"{folder}/{MANIFEST}")
        return read_manifest(files, folder)
    worlds = sorted({world for name in names if (world := world_of(name)) is not None})
    if len(worlds) > 1:
        raise ManifestError(f"{folder}: shards of {worlds} ranks in one folder")
    if not worlds or SKELETON not in names:
        return None
    if any(shard_manifest(rank, worlds[0]) not in names for rank in range(worlds[0])):
        return None
    try:
        shards, entries = read_shards(files, folder, worlds[0])
        read_skeleton(files, folder, shards)
    except FileNotFoundError:  # a keeper has just begun to write one again
        return None
    first = shards[0]
    manifest = Manifest(
        run=first.run,
        attempt=first.attempt,
        branch=first.branch,
        generation=first.generation,
        step=first.step,
        token=first.token,
        world=first.world,
        state_bytes=first.state_bytes,
        skeleton=first.skeleton,
        skeleton_bytes=first.skeleton_bytes,
        lineage=lineage,
        saved_at=saved_at,
        writer=_writer(),
        shards=tuple(entries),
    )
    files.write(f"{folder}/{MANIFEST}", [manifest.to_bytes()])
    return manifest


def _writer() -> str:
    try:
        return f"resilient-runtime {version('resilient-runtime')}"
    except PackageNotFoundError:  # run from its sources
        return "resilient-runtime"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint's folder as it was seen. manifest: None unless it is complete; why: what is wrong with it, then."""

    folder: str
    key: CheckpointKey
    manifest: Manifest | None
    why: str = ""

    @property
    def complete(self) -> bool:
        return self.manifest is not None

    @property
    def run(self) -> str:
        """Whose it is; "" if that can't be told."""
        return self.key.run or (self.manifest.run if self.manifest is not None else "")


def checkpoints(files: Files, run: str | None = None) -> list[Found]:
    """All folders of checkpoints, or those of one run, the newest last. What is wrong with one is said there.

    Shards are not looked at. Raises StorageError if the folders can't be listed.
    """
    found = [found for found, _ in _looks(files, _keys(files, run))]
    return found if run is None else [each for each in found if each.run == run]


def newest_attempt(files: Files, run: str) -> int:
    """The highest of this run that has left a folder here, complete or not; 0 if there is none."""
    return max((key.attempt for key in _keys(files, run)), default=0)


def newest(
    files: Files, lineage: Lineage | None = None, step: int | None = None, run: str | None = None
) -> Found | None:
    """The newest complete checkpoint; None if there is none.

    lineage: only one on its line. step: only one of exactly this step. run: only one of this run.
    Raises StorageError if there is none, and one could not be looked at.
    """
    failure: StorageError | None = None
    for key in reversed(_keys(files, run)):
        if (step is not None and key.step != step) or (lineage and not lineage.holds(key.branch, key.step)):
            continue
        found, error = _look(files, key)
        if found.complete and run in (None, found.run):
            return found
        failure = failure or error
    if failure is not None:
        raise failure
    return None


def other_run(files: Files, run: str) -> Found | None:
    """The newest checkpoint of another run, whole or just begun, where this run has no whole one."""
    other = None
    for key in reversed(_keys(files)):
        if key.run not in ("", run):
            other = other or Found(folder=key.folder, key=key, manifest=None, why=INCOMPLETE)
            continue
        found, _ = _look(files, key)
        if found.complete and found.run == run:
            return None
        other = other or (found if found.run not in ("", run) else None)
    return other


def other_runs(files: Files, run: str) -> set[str]:
    """Those whose names stand in folders."""
    return {key.run for key in _keys(files)} - {"", run}


def also_there(url: str, other: str) -> str:
    return f"the run {other!r} keeps checkpoints at {url} as well: each is left alone, but give every run its own URL"


Known = dict[str, bool]
"""By folder: whether it is a complete checkpoint of this run, or no folder of this run's. Neither changes."""


def prune(
    files: Files,
    keep: int,
    *,
    run: str,
    attempt: int,
    token: str,
    verified: str | None = None,
    known: Known | None = None,
) -> list[str]:
    """Remove what the run no longer needs; the folders that are gone, oldest first. Other runs' are not touched.

    Complete checkpoints older than the newest `keep` go, and incomplete folders that nobody completes any more: of
    lower attempts, and of this submission if it has completed a newer one. What cannot be read stays, as do those of
    higher attempts and of another submission with the same attempt, and the newest complete one.
    verified: a folder that stays as well. known: what earlier calls of the same run have seen, which is not read again.
    Raises StorageError.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, must be at least 1")
    keys, known = _keys(files, run), {} if known is None else known
    looks = _looks(files, [key for key in keys if key.folder not in known])
    fates = {each.folder: each.complete if _is_of(files, each, run) else None for each, _ in looks}
    known.update({folder: bool(whole) for folder, whole in fates.items() if whole is not False})
    unfinished = {each.folder for each, _ in looks if fates[each.folder] is False and each.why == INCOMPLETE}
    complete = [key for key in keys if known.get(key.folder)]
    if not complete:
        for _, failure in looks:
            if failure is not None:
                raise failure
        return []
    # It may be visible before it is durable, if its writer has just died.
    files.settle(f"{complete[-1].folder}/{MANIFEST}")
    staying = {key.folder for key in complete[-keep:]} | {verified}
    mine = [key for key in complete if (key.attempt, key.token) == (attempt, token)]
    removed = []
    for key in keys:
        own = (key.attempt, key.token) == (attempt, token)
        if key.folder in staying or (not own and key.attempt >= attempt):
            continue
        abandoned = key.folder in unfinished and (not own or (bool(mine) and key < mine[-1]))
        if known.get(key.folder) or abandoned:
            files.remove_folder(key.folder)
            removed.append(key.folder)
            known.pop(key.folder, None)
    for each, _ in looks:
        if each.complete and each.folder in staying and (each.key.attempt < attempt or each.key in mine):
            _tidy(files, each.folder)
    return removed


def _tidy(files: Files, folder: str) -> None:
    """What a keeper was writing when it died."""
    for name in filter(is_temporary, files.names(folder)):
        files.remove(f"{folder}/{name}")


def _is_of(files: Files, found: Found, run: str) -> bool:
    """An unfinished folder that an earlier version has written says it in a shard's manifest, if there is one."""
    if found.run or found.why != INCOMPLETE:
        return found.run == run
    for name in files.names(found.folder):
        if world_of(name) is not None:
            with contextlib.suppress(ManifestError, FileNotFoundError):
                file = f"{found.folder}/{name}"
                return ShardManifest.from_bytes(files.read(file), file=file).run == run
    return False


def _keys(files: Files, run: str | None = None) -> list[CheckpointKey]:
    """run: without those that another one's name stands in."""
    found = (key for name in files.names() if (key := CheckpointKey.of_folder(name)) is not None)
    return sorted(key for key in found if run is None or key.run in ("", run))


def _looks(files: Files, keys: Sequence[CheckpointKey]) -> list[tuple[Found, StorageError | None]]:
    return in_lanes(files, partial(_look, files), keys)


def _look(files: Files, key: CheckpointKey) -> tuple[Found, StorageError | None]:
    manifest, why, failure = None, "", None
    try:
        manifest = read_manifest(files, key.folder)
    except FileNotFoundError:
        why = INCOMPLETE
    except ManifestError as error:
        why = str(error)
    except StorageError as error:
        why, failure = str(error), error
    return Found(folder=key.folder, key=key, manifest=manifest, why=why), failure
