"""The manifests of a durable checkpoint: what lies where, and how to tell that it is whole.

Two kinds of files. Beside each rank's share lies its *shard manifest*, in the words of the slot that it came from,
with the chunks as they are stored. The *manifest*, written last, makes the checkpoint: it names every shard manifest
by length and hash. Nothing here reads or writes; all checks that need no other file are made when a value is made,
so there is no manifest that contradicts itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

import xxhash

from snapshot.core.branches import Branch, Lineage
from snapshot.core.chunks import CHUNK_ELEMENTS, are_chunks, ends_within
from snapshot.core.names import CheckpointKey, shard_file, shard_manifest
from snapshot.core.ranges import Ranges, check_ranges, cuts_of, size_of
from snapshot.core.spelling import ManifestError, spelled, unspelled

SHARD_FORMAT, SHARD_VERSION = "resilient-shard", 2
FORMAT = "resilient-checkpoint"
MAX_ITEM_BYTES = 64
CHUNK_LIMIT_BYTES = CHUNK_ELEMENTS * MAX_ITEM_BYTES

_DIGEST = re.compile("[0-9a-f]{32}")
_SUM = re.compile("[0-9a-f]{16}")
_TEXT = re.compile(r"[ -~]{1,200}")
_KEY_FIELDS = ("attempt", "branch", "step", "generation", "token", "run")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunk:
    """One chunk of a share, as it lies in the shard's file, right behind the one before.

    end: where it ends in the share, in bytes as captured.
    stored_bytes: how many it takes in the file.
    coding: "raw", the bytes as captured; or "zstd", one frame of them. shuffle: if not 1, the items' bytes were
        regrouped before: first the first byte of each item of so many bytes, then the second of each, and so on.
    xxh3_64: of the bytes as captured. stored_xxh3_64: of those in the file.
    """

    end: int
    stored_bytes: int
    coding: Literal["raw", "zstd"]
    shuffle: int
    xxh3_64: int
    stored_xxh3_64: int

    def check(self, raw_bytes: int) -> None:
        """Raises ManifestError unless it can be the coding of so many bytes."""
        _counts(self, "end", "stored_bytes", "shuffle")
        if not 0 < raw_bytes <= CHUNK_LIMIT_BYTES:
            raise ManifestError(f"end: {self.end}: a chunk of {raw_bytes} bytes, must be 1..{CHUNK_LIMIT_BYTES}")
        match self.coding:
            case "raw":
                if (self.stored_bytes, self.shuffle, self.stored_xxh3_64) != (raw_bytes, 1, self.xxh3_64):
                    raise ManifestError(f"coding: 'raw', but {raw_bytes} bytes are not stored as they are: {self}")
            case "zstd":
                if not 0 < self.stored_bytes < raw_bytes:
                    raise ManifestError(f"stored_bytes: {self.stored_bytes}, must be 1..{raw_bytes - 1}")
                if not 1 <= self.shuffle <= MAX_ITEM_BYTES or raw_bytes % self.shuffle:
                    raise ManifestError(f"shuffle: {self.shuffle}, must be 1..{MAX_ITEM_BYTES} and divide {raw_bytes}")
            case _:
                raise ManifestError(f"coding: {self.coding!r:.80}, must be 'raw' or 'zstd'")

    def node(self) -> dict[str, object]:
        return {
            "end": self.end,
            "stored_bytes": self.stored_bytes,
            "coding": self.coding,
            "shuffle": self.shuffle,
            "xxh3_64": f"{self.xxh3_64:016x}",
            "stored_xxh3_64": f"{self.stored_xxh3_64:016x}",
        }

    @classmethod
    def of_node(cls, node: Mapping[str, Any]) -> StoredChunk:
        return cls(**{**node, "xxh3_64": _sum(node, "xxh3_64"), "stored_xxh3_64": _sum(node, "stored_xxh3_64")})


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardManifest:
    """One rank's share of a checkpoint. See `SlotHead` for the fields that both have.

    ranges: if there is exactly one, the file is of version 1, which says `start` and `stop` instead, and where an empty
        share lies as well: so one range may be empty.
    file, file_bytes: where the chunks lie, one after the other, from its first byte to its last.
    """

    run: str
    attempt: int
    branch: int
    generation: int
    step: int
    token: str
    member: int
    rank: int
    world: int
    ranges: Ranges
    state_bytes: int
    skeleton: str
    skeleton_bytes: int
    file: str
    file_bytes: int
    chunks: tuple[StoredChunk, ...]

    def __post_init__(self) -> None:
        _check_common(self)
        _counts(self, "member", "rank", "file_bytes")
        if self.rank >= self.world:
            raise ManifestError(f"rank: {self.rank}, must be 0..{self.world - 1}")
        _check_ranges(self.ranges, self.state_bytes)
        if self.file != shard_file(self.rank, self.world):
            raise ManifestError(f"file: {self.file!r:.80}, must be {shard_file(self.rank, self.world)!r}")
        former = 0
        for number, chunk in enumerate(self.chunks):
            try:
                chunk.check(chunk.end - former if type(chunk.end) is int else 0)
            except ManifestError as error:
                raise ManifestError(f"chunks: {number}: {error}") from error
            former = chunk.end
        if former != self.share_bytes:
            raise ManifestError(f"chunks: they end at {former}, must at {self.share_bytes}, with the share")
        if not {0, *(chunk.end for chunk in self.chunks)}.issuperset(cuts_of(self.ranges)):
            raise ManifestError("chunks: one spans two ranges")
        stored_bytes = sum(chunk.stored_bytes for chunk in self.chunks)
        if stored_bytes != self.file_bytes:
            raise ManifestError(f"file_bytes: {self.file_bytes}, but the chunks take {stored_bytes}")

    @property
    def key(self) -> CheckpointKey:
        return CheckpointKey(**{name: getattr(self, name) for name in _KEY_FIELDS})

    @property
    def share_bytes(self) -> int:
        return size_of(self.ranges)

    @property
    def stored_ends(self) -> tuple[int, ...]:
        """Where each chunk ends in the file."""
        return tuple(accumulate(chunk.stored_bytes for chunk in self.chunks))

    def to_bytes(self) -> bytes:
        fields: dict[str, object] = {}
        for name in self.__slots__:
            if name == "ranges" and len(self.ranges) == 1:
                fields["start"], fields["stop"] = self.ranges[0]
            else:
                fields[name] = getattr(self, name)
        fields["chunks"] = [chunk.node() for chunk in self.chunks]
        return spelled(SHARD_FORMAT, fields, version=2 if "ranges" in fields else 1)

    @classmethod
    def from_bytes(cls, data: bytes, *, file: str) -> ShardManifest:
        """Raises ManifestError, naming the file, for anything that `to_bytes` can't have written."""
        try:
            version, node = unspelled(SHARD_FORMAT, data, SHARD_VERSION)
            if version == 1:
                node["ranges"] = ((node.pop("start"), node.pop("stop")),)
            ranges, chunks = tuple(map(tuple, node["ranges"])), tuple(map(StoredChunk.of_node, node["chunks"]))
            shard = cls(**{**node, "ranges": ranges, "chunks": chunks})
            _check_spelling(shard.to_bytes(), data)
        except _UNFIT as error:
            raise _refusal(file, error) from error
        return shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """What a manifest says of a shard. manifest: the name of its shard manifest, with its length and hash."""

    manifest: str
    manifest_bytes: int
    xxh3_128: str
    file: str
    file_bytes: int

    def check(self, rank: int, world: int) -> None:
        _counts(self, "manifest_bytes", "file_bytes")
        _digest("xxh3_128", self.xxh3_128)
        for name, wanted in (("manifest", shard_manifest(rank, world)), ("file", shard_file(rank, world))):
            if getattr(self, name) != wanted:
                raise ManifestError(f"{name}: {getattr(self, name)!r:.80}, must be {wanted!r}")

    @classmethod
    def of(cls, shard: ShardManifest, data: bytes) -> ShardEntry:
        """data: its spelling, as it was read."""
        return cls(
            manifest=shard_manifest(shard.rank, shard.world),
            manifest_bytes=len(data),
            xxh3_128=xxhash.xxh3_128_hexdigest(data),
            file=shard.file,
            file_bytes=shard.file_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole checkpoint. lineage: all branches of the run. saved_at, writer: when and by what, to be read by people.

    shards: by rank.
    """

    run: str
    attempt: int
    branch: int
    generation: int
    step: int
    token: str
    world: int
    state_bytes: int
    skeleton: str
    skeleton_bytes: int
    lineage: Lineage
    saved_at: str
    writer: str
    shards: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        _check_common(self)
        for name in ("saved_at", "writer"):
            text = getattr(self, name)
            if type(text) is not str or not _TEXT.fullmatch(text):
                raise ManifestError(f"{name}: {text!r:.80}, must be 1..200 printable ASCII characters")
        if self.branch not in {branch.number for branch in self.lineage.branches}:
            raise ManifestError(f"branch: {self.branch} is not in the lineage")
        if len(self.shards) != self.world:
            raise ManifestError(f"shards: {len(self.shards)}, must be {self.world}")
        for rank, entry in enumerate(self.shards):
            try:
                entry.check(rank, self.world)
            except ManifestError as error:
                raise ManifestError(f"shards: {rank}: {error}") from error

    @property
    def key(self) -> CheckpointKey:
        return CheckpointKey(**{name: getattr(self, name) for name in _KEY_FIELDS})

    @property
    def stored_bytes(self) -> int:
        """What the shards take on storage."""
        return sum(entry.file_bytes for entry in self.shards)

    def to_bytes(self) -> bytes:
        fields = {name: getattr(self, name) for name in self.__slots__}
        lineage = [_branch_node(branch) for branch in self.lineage.branches]
        return spelled(FORMAT, fields | {"lineage": lineage, "shards": [asdict(entry) for entry in self.shards]})

    @classmethod
    def from_bytes(cls, data: bytes, *, file: str) -> Manifest:
        """Raises ManifestError, naming the file, for anything that `to_bytes` can't have written."""
        try:
            _, node = unspelled(FORMAT, data)
            branches = [Branch(**{**each, "skipped": tuple(each["skipped"])}) for each in node["lineage"]]
            for branch in branches:
                _check_branch(branch)
            shards = tuple(ShardEntry(**each) for each in node["shards"])
            manifest = cls(**{**node, "lineage": Lineage(branches=tuple(branches)), "shards": shards})
            _check_spelling(manifest.to_bytes(), data)
        except _UNFIT as error:
            raise _refusal(file, error) from error
        return manifest


def check_cover(shards: Sequence[ShardManifest]) -> None:
    """Raises ManifestError unless they are the shards of one snapshot, by rank, and together all of its bytes."""
    first = shards[0]
    if [shard.rank for shard in shards] != list(range(first.world)):
        raise ManifestError(f"shards: {len(shards)} are there, must be those of ranks 0..{first.world - 1}")
    for shard in shards:
        for name in ("run", *_KEY_FIELDS[:-1], "world", "state_bytes", "skeleton", "skeleton_bytes"):
            if getattr(shard, name) != getattr(first, name):
                raise ManifestError(
                    f"{shard.file}: {name}: {getattr(shard, name)!r:.80}, but {getattr(first, name)!r:.80} "
                    f"in {first.file}"
                )
    at, file = 0, first.file
    for start, stop, file in sorted((*each, shard.file) for shard in shards for each in shard.ranges):
        if start != at:
            raise ManifestError(f"{file}: start: {start}, must be {at}, where the bytes of other shares end")
        at = stop
    if at != first.state_bytes:
        raise ManifestError(f"{file}: stop: {at}, must be {first.state_bytes}, the end of the state")


def check_cuts(shard: ShardManifest, ends: Sequence[int]) -> None:
    """Raises ManifestError unless its chunks are those of the state. ends: see `snapshot.core.chunks`."""
    wanted = ends_within(ends, shard.ranges) if are_chunks(ends, shard.ranges) else None
    if [chunk.end for chunk in shard.chunks] != wanted:
        raise ManifestError(f"{shard.file}: chunks: they don't end where those of the skeleton's tensors do")


_UNFIT = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What values of wrong types and shapes make of the code above."""


def _refusal(file: str, error: Exception) -> ManifestError:
    if isinstance(error, ValueError):
        return ManifestError(f"{file}: {error}")
    return ManifestError(f"{file}: fields are missing, unknown, or of a wrong type: {error!r:.200}")


def _check_common(found: ShardManifest | Manifest) -> None:
    _counts(found, "world", "state_bytes", "skeleton_bytes")
    if type(found.run) is not str or not 0 < len(found.run) <= 255:
        raise ManifestError(f"run: {found.run!r:.80}, must be a name of 1..255 characters")
    if found.world < 1 or found.skeleton_bytes < 1:
        raise ManifestError(f"world: {found.world}, skeleton_bytes: {found.skeleton_bytes}; must be at least 1")
    _digest("skeleton", found.skeleton)
    CheckpointKey(**{name: getattr(found, name) for name in _KEY_FIELDS})


def _check_ranges(ranges: Ranges, state_bytes: int) -> None:
    is_empty = len(ranges) == 1 and len(ranges[0]) == 2 and type(ranges[0][0]) is int and ranges[0][0] == ranges[0][1]
    if is_empty and type(ranges[0][1]) is int and 0 <= ranges[0][0] <= state_bytes:
        return
    try:
        check_ranges(ranges, state_bytes)
    except ValueError as error:
        raise ManifestError(str(error)) from error


def _check_spelling(wanted: bytes, found: bytes) -> None:
    if wanted != found:
        at = next((at for at, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), len(wanted))
        raise ManifestError(f"damaged: not spelled as it must be, from byte {at}")


def _counts(holder: object, *names: str) -> None:
    for name in names:
        value = getattr(holder, name)
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ManifestError(f"{name}: {value!r:.80}, must be an integer within 0..2**63-1")


def _digest(name: str, value: object) -> None:
    if type(value) is not str or not _DIGEST.fullmatch(value):
        raise ManifestError(f"{name}: {value!r:.80}, must be 32 hexadecimal digits")


def _sum(node: Mapping[str, Any], name: str) -> int:
    if not _SUM.fullmatch(node[name]):
        raise ManifestError(f"{name}: {node[name]!r:.80}, must be 16 hexadecimal digits")
    return int(node[name], 16)


def _check_branch(branch: Branch) -> None:
    _counts(branch, "number", "at_step", *(["parent"] if branch.parent is not None else []))
    if any(type(position) is not int for position in branch.skipped):
        raise ManifestError(f"lineage: branch {branch.number}: skipped: not all are integers")


def _branch_node(branch: Branch) -> dict[str, object]:
    return asdict(branch) | {"skipped": list(branch.skipped)}
