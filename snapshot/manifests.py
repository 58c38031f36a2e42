"""The manifests of a checkpoint on storage: read, and compared with each other and with what lies beside them.

Every length is compared with that of the file before the file is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from snapshot.core.chunks import chunk_ends
from snapshot.core.manifest import Manifest, ShardEntry, ShardManifest, check_cover, check_cuts
from snapshot.core.names import MANIFEST, SKELETON, CheckpointKey, shard_manifest
from snapshot.core.spelling import LIMIT_BYTES, ManifestError
from snapshot.files import Files, in_lanes
from snapshot.skeleton import Skeleton


def read_manifest(files: Files, folder: str) -> Manifest:
    """Raises ManifestError, StorageError, or FileNotFoundError if the checkpoint isn't complete."""
    name = f"{folder}/{MANIFEST}"
    manifest = Manifest.from_bytes(_read_bounded(files, name), file=name)
    if folder not in manifest.key.folders:
        raise ManifestError(f"{name}: it is that of {manifest.key.folder}")
    return manifest


def read_shard(files: Files, folder: str, rank: int, world: int) -> tuple[ShardManifest, ShardEntry]:
    """A shard manifest, compared with its own file, and what the manifest is to say of it."""
    name = f"{folder}/{shard_manifest(rank, world)}"
    data = _read_bounded(files, name)
    shard = ShardManifest.from_bytes(data, file=name)
    if folder not in shard.key.folders or (shard.rank, shard.world) != (rank, world):
        raise ManifestError(f"{name}: it is that of rank {shard.rank} of {shard.world} in {shard.key.folder}")
    found = files.size(f"{folder}/{shard.file}")
    if found != shard.file_bytes:
        raise ManifestError(f"{folder}/{shard.file}: {found} bytes, but {shard.file_bytes} in its manifest")
    return shard, ShardEntry.of(shard, data)


def read_shards(files: Files, folder: str, world: int) -> tuple[list[ShardManifest], list[ShardEntry]]:
    """Of all ranks, which together are the state. Raises as `read_manifest`."""

    def read(rank: int) -> tuple[ShardManifest, ShardEntry]:
        return read_shard(files, folder, rank, world)

    found = in_lanes(files, read, range(world))
    shards = [shard for shard, _ in found]
    try:
        check_cover(shards)
    except ManifestError as error:
        raise ManifestError(f"{folder}/{error}") from error
    return shards, [entry for _, entry in found]


def read_skeleton(files: Files, folder: str, shards: Sequence[ShardManifest]) -> Skeleton:
    """The skeleton that all shards name, of which they are cuts."""
    name, first = f"{folder}/{SKELETON}", shards[0]
    found = files.size(name)
    if found != first.skeleton_bytes or found > LIMIT_BYTES:
        raise ManifestError(f"{name}: {found} bytes, but {first.skeleton_bytes} in the manifests")
    data = files.read(name, 0, found)
    if xxhash.xxh3_128_hexdigest(data) != first.skeleton:
        raise ManifestError(f"{name}: damaged: its digest is not {first.skeleton}")
    try:
        skeleton = Skeleton.from_bytes(data)
    except (ValueError, AttributeError) as error:
        raise ManifestError(f"{name}: {error}") from error
    if skeleton.offsets[-1] != first.state_bytes:
        raise ManifestError(
            f"{name}: its tensors have {skeleton.offsets[-1]} bytes, but {first.state_bytes} in the manifests"
        )
    ends = chunk_ends((spec.nbytes // spec.itemsize, spec.itemsize) for spec in skeleton.tensors)
    for shard in shards:
        try:
            check_cuts(shard, ends)
        except ManifestError as error:
            raise ManifestError(f"{folder}/{error}") from error
    return skeleton


def folder_of(run: str, attempt: int, branch: int, step: int, generation: int, token: str) -> str:
    key = CheckpointKey(run=run, attempt=attempt, branch=branch, step=step, generation=generation, token=token)
    return key.folder


def _read_bounded(files: Files, name: str) -> bytes:
    size = files.size(name)
    if size > LIMIT_BYTES:
        raise ManifestError(f"{name}: {size} bytes, more than {LIMIT_BYTES}: no manifest is so long")
    return files.read(name, 0, size)
