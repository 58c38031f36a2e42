"""Small states as slots hold them, cut as real ones are, made without torch."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from snapshot.core.branches import Branch, Lineage
from snapshot.core.chunks import chunk_ends, ends_within, share_of
from snapshot.core.manifest import Manifest
from snapshot.core.ranges import Ranges, merged
from snapshot.files import Files
from snapshot.manifests import folder_of
from snapshot.skeleton import Skeleton, TensorSpec
from snapshot.slot import SlotHead, chunk_sums
from snapshot.store import commit, write_shard

TOKEN = "1f2e3d4c"
LINEAGE = Lineage(branches=(Branch(number=0), Branch(number=1, parent=0, at_step=40, skipped=(45, 46))))
SAVED_AT = "2026-01-02T03:04:05Z"

Shape = tuple[str, str, int, tuple[int, ...]]
"""name, dtype, bytes of an element, shape"""

SMALL: tuple[Shape, ...] = (
    ("model.weight", "float32", 4, (30, 20)),
    ("model.empty", "float32", 4, (0, 7)),
    ("model.bias", "bfloat16", 2, (33,)),
    ("optimizer.step", "int64", 8, (3,)),
    ("mask", "bool", 1, (101,)),
)
LARGE: tuple[Shape, ...] = (
    ("model.weight", "float32", 4, (700, 1000)),
    ("noise", "uint8", 1, (600_001,)),
    ("model.bias", "bfloat16", 2, (300_000,)),
    ("optimizer.step", "int64", 8, (3,)),
)
"""Several chunks per tensor; three shares of it have a boundary within a tensor."""


@dataclass(frozen=True)
class State:
    """A snapshot: all of its bytes, and each rank's share as in its slot."""

    skeleton: Skeleton
    data: bytes
    step: int = 500
    branch: int = 0
    attempt: int = 1
    generation: int = 1
    world: int = 2
    run: str = "gpt"
    token: str = TOKEN
    spread: tuple[Ranges, ...] | None = None
    """By rank its share; None for the usual ones."""

    @property
    def folder(self) -> str:
        return folder_of(self.run, self.attempt, self.branch, self.step, self.generation, self.token)

    @property
    def ends(self) -> tuple[int, ...]:
        return chunk_ends((spec.nbytes // spec.itemsize, spec.itemsize) for spec in self.skeleton.tensors)

    def head(self, rank: int) -> SlotHead:
        raw = self.skeleton.to_bytes()
        ranges = merged([share_of(self.ends, rank, self.world)]) if self.spread is None else self.spread[rank]
        return SlotHead(
            run=self.run,
            attempt=self.attempt,
            branch=self.branch,
            generation=self.generation,
            step=self.step,
            member=rank + 100,
            rank=rank,
            world=self.world,
            ranges=ranges,
            state_bytes=len(self.data),
            chunks=(len(raw), *(len(raw) + end for end in ends_within(self.ends, ranges))),
            skeleton=xxhash.xxh3_128_hexdigest(raw),
            skeleton_bytes=len(raw),
        )

    def payload(self, rank: int) -> memoryview:
        share = b"".join(self.data[start:stop] for start, stop in self.head(rank).ranges)
        return memoryview(self.skeleton.to_bytes() + share)

    def write(self, files: Files, rank: int, compression: int | None = None) -> None:
        head, payload = self.head(rank), self.payload(rank)
        sums = chunk_sums(payload, head)
        write_shard(files, token=self.token, head=head, payload=payload, sums=sums, compression=compression)

    def save(self, files: Files, compression: int | None = None) -> Manifest:
        """All shards, then the manifest."""
        for rank in range(self.world):
            self.write(files, rank, compression)
        manifest = commit(files, self.folder, lineage=LINEAGE, saved_at=SAVED_AT)
        assert manifest is not None
        return manifest


def state_of(step: int = 500, shapes: tuple[Shape, ...] = SMALL, **fields: object) -> State:
    """Another one for each step: weights that compress a little, as real ones do; noise that doesn't."""
    specs = tuple(
        TensorSpec(name=name, dtype=dtype, itemsize=size, shape=shape, order=tuple(range(len(shape))), device="cpu")
        for name, dtype, size, shape in shapes
    )
    values = np.random.default_rng(step)
    data = b"".join(
        values.standard_normal(spec.nbytes // 4 + 1, np.float32).tobytes()[: spec.nbytes]
        if spec.dtype == "float32"
        else values.bytes(spec.nbytes)
        if spec.dtype == "uint8"
        else bytes(spec.nbytes)
        for spec in specs
    )
    skeleton = Skeleton(tensors=specs, objects={"model": {"values": {"dict": [["step", step]]}}})
    return State(skeleton=skeleton, data=data, step=step, **fields)  # type: ignore[arg-type]


def scattered(state: State, seed: int = 0) -> State:
    """The same, each chunk in the share of any rank."""
    chance, ends = random.Random(seed), state.ends
    owners = [chance.randrange(state.world) for _ in ends]
    spans = [*zip((0, *ends), ends, owners, strict=False)]
    ranges = (merged((a, b) for a, b, owner in spans if owner == rank) for rank in range(state.world))
    return replace(state, spread=tuple(ranges))


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def some_bit(seed: int) -> int:
    return random.Random(seed).randrange(8)
