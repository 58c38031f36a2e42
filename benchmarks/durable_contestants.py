"""What is compared: each makes the same state durable in a folder on disk, and loads it from there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from benchmarks.gpt import Training
from resilient.core.plan import first_branch
from resilient.restoring import fetch_stored
from snapshot import store
from snapshot.capture import capture
from snapshot.core.chunks import ends_within
from snapshot.files import open_files
from snapshot.slot import SlotHead, chunk_sums

LIMIT_S = 120.0
PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """save returns when all is on disk. load brings it into memory, as tensors on CPU; None where there is no way."""

    folder: Path
    save: Callable[[], object]
    load: Callable[[], object] | None
    close: Callable[[], object] = lambda: None

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()


def field(training: Training, base: Path) -> dict[str, Contestant]:
    shard = sealed(training)
    made: dict[str, Callable[[Training, Path], Contestant]] = {
        "plain write": lambda _, folder: plain_write(shard[1], folder),
        "ours, raw": lambda _, folder: ours(shard, folder, None),
        "ours, zstd-1": lambda _, folder: ours(shard, folder, 1),
        "dcp process": dcp_process,
        "torch.save": torch_save,
        "safetensors": save_tensors,
    }
    found = {}
    for number, (name, make) in enumerate(made.items()):
        folder = base / str(number)
        folder.mkdir()
        found[name] = make(training, folder)
    return found


def sealed(training: Training) -> tuple[SlotHead, memoryview, list[int]]:
    """As a keeper has it: the state in memory, with its chunks' checksums."""
    table = capture({"model": training.model, "optimizer": training.optimizer})
    ends = table.chunk_ends()
    head = SlotHead(
        run="bench",
        attempt=1,
        branch=0,
        generation=1,
        step=1,
        member=1,
        rank=0,
        world=1,
        ranges=((0, table.nbytes),),
        state_bytes=table.nbytes,
        skeleton=xxhash.xxh3_128_hexdigest(table.skeleton),
        skeleton_bytes=len(table.skeleton),
        chunks=tuple(len(table.skeleton) + end for end in (0, *ends_within(ends, ((0, table.nbytes),)))),
        durable=True,
    )
    payload = bytearray(table.skeleton)
    for piece in table.pieces(0, table.nbytes):
        payload += piece.numpy().data
    view = memoryview(payload).toreadonly()
    return head, view, chunk_sums(view, head)


def ours(shard: tuple[SlotHead, memoryview, list[int]], folder: Path, level: int | None) -> Contestant:
    head, payload, sums = shard
    url = str(folder / "run")

    def save() -> None:
        files = open_files(url)
        store.write_shard(files, token="00000000", head=head, payload=payload, sums=sums, compression=level)
        (found,) = store.checkpoints(files)
        assert store.commit(files, found.folder, lineage=first_branch(), saved_at="now") is not None

    def load() -> object:
        found = store.newest(open_files(url))
        assert found is not None
        return fetch_stored(url, found.folder)

    return Contestant(folder=folder, save=save, load=load)


def plain_write(payload: memoryview, folder: Path) -> Contestant:
    """The floor: the same bytes, one after the other, and flushed to disk."""

    def save() -> None:
        with open(folder / "bytes", "wb", buffering=0) as file:
            for at in range(0, len(payload), PIECE_BYTES):
                file.write(payload[at : at + PIECE_BYTES])
            os.fsync(file.fileno())

    return Contestant(folder=folder, save=save, load=None)


def dcp_process(training: Training, folder: Path) -> Contestant:
    """Staged into shared memory that is kept, written by a background process; `FileSystemWriter` flushes its files."""
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
    )
    stager = DefaultStager(options)

    def save() -> None:
        answer: Any = async_save(
            training.state_dict(),
            storage_writer=FileSystemWriter(folder / "dcp"),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=stager,
        )
        answer.upload_completion.result(LIMIT_S)

    def load() -> object:
        empty = _map(training.state_dict(), torch.empty_like)
        dcp.load(empty, checkpoint_id=folder / "dcp")
        return empty

    return Contestant(folder=folder, save=save, load=load, close=stager.close)


def torch_save(training: Training, folder: Path) -> Contestant:
    path = folder / "state.pt"

    def save() -> None:
        torch.save(training.state_dict(), path)
        flush(path)

    return Contestant(folder=folder, save=save, load=lambda: torch.load(path, weights_only=True))


def save_tensors(training: Training, folder: Path) -> Contestant:
    """Tensors only."""
    path = folder / "state.safetensors"

    def save() -> None:
        safetensors.torch.save_file({str(n): tensor for n, tensor in enumerate(training.tensors())}, path)
        flush(path)

    return Contestant(folder=folder, save=save, load=lambda: safetensors.torch.load_file(path))


def flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def evict(folder: Path) -> None:
    """Out of the page cache, as far as the kernel follows the advice."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _map(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(value, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map(value, function) for value in tree]
    return tree
