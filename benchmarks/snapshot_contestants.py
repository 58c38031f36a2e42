"""What is compared: each saves the same state on request, and says when the state may be written again."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save

from actors.standing import read_standing
from benchmarks.gpt import Training
from benchmarks.snapshot_keeper import ATTEMPT, GENERATION, RUN
from resilient.core.cadence import Cadence
from resilient.core.lane import Agreed
from resilient.snapshots import Seating, Snapshots
from snapshot.core.lifecycle import Ordinal
from snapshot.room import reserve

LIMIT_S = 60.0
POLL_S = 0.002


class Contestant(Protocol):
    """One rank's side. All ranks call the same methods in the same order.

    size_bytes: what this rank copies for one snapshot.
    """

    size_bytes: int

    def agree(self) -> None:
        """What ranks say to each other anyway, with their gradients: part of the step, not of what is blocked."""

    def take(self) -> bool:
        """The state stands: save it. Whether that was done, or begun."""

    def mutable(self) -> None:
        """Returns when the state may be written."""

    def settle(self) -> None:
        """Returns when nothing goes on in the background any more."""

    def close(self) -> None: ...


class Ours:
    """`Snapshots`, with a keeper for each node; settled when all keepers have it protected."""

    def __init__(self, training: Training, base: Path, nodes: tuple[str, ...]) -> None:
        rank, self._world = dist.get_rank(), dist.get_world_size()
        self._folders = [base / node for node in nodes[: self._world]]
        self._objects = {"model": training.model, "optimizer": training.optimizer}
        self._seating = Seating(generation=GENERATION, rank=rank, world=self._world)
        self.snapshots = Snapshots(
            run=RUN,
            attempt=ATTEMPT,
            folder=self._folders[rank],
            member=rank,
            device=torch.device("cpu"),
            cadence=Cadence(every=1, budget=1.0),
            say=print,
        )
        self._step = 0
        self._last = -1
        self._wanted = False
        self.size_bytes = training.state_bytes // self._world
        self._warm_up()

    def _warm_up(self) -> None:
        """Slots are made in the background, after the first boundary has told how large they must be."""
        self.snapshots.boundary(Ordinal(0, self._step), self._objects, self._seating, wanted=False)
        deadline = time.monotonic() + LIMIT_S
        for _ in range(4):
            while not self._wanted and time.monotonic() < deadline:
                time.sleep(0.01)
                self.agree()
            self.take()
            self.mutable()
            self.settle()
            self._wanted = False

    def agree(self) -> None:
        self._step += 1
        wish = self.snapshots.wish(Ordinal(0, self._step), GENERATION)
        lane = torch.tensor(wish.lane())
        if self._world > 1:
            dist.all_reduce(lane, op=dist.ReduceOp.MIN)
        agreed = Agreed.of(lane.tolist())
        self.snapshots.agreed(Ordinal(0, self._step), agreed)
        self._wanted = agreed.capture

    def take(self) -> bool:
        ordinal = Ordinal(0, self._step)
        self.snapshots.boundary(ordinal, self._objects, self._seating, wanted=self._wanted)
        if self._wanted:
            self._last = ordinal.packed()
        return self._wanted

    def mutable(self) -> None:
        self.snapshots.gate()

    def settle(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while any(read_standing(folder, GENERATION).protected < self._last for folder in self._folders):
            if time.monotonic() > deadline:
                raise TimeoutError(f"snapshot {self._last} was not protected within {LIMIT_S:.0f} s")
            time.sleep(POLL_S)

    def close(self) -> None:
        assert self.snapshots.tally.torn == 0, self.snapshots.tally


class Dcp:
    """`torch.distributed.checkpoint.async_save`.

    The stager and its shared memory are kept between saves, so the next save may not begin before the last one
    has been written: the copy that is being written would change.
    """

    def __init__(self, training: Training, folder: Path, *, mode: str) -> None:
        """folder: for all ranks and modes the same, since memory is short; each save replaces the one before."""
        self._training = training
        self._folder = folder
        self._type = AsyncCheckpointerType.THREAD if mode == "thread" else AsyncCheckpointerType.PROCESS
        # Pinned memory and copies that don't block need CUDA, and are refused without.
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=mode == "process",
            use_non_blocking_copy=False,
        )
        self._stager = None if mode == "thread" else DefaultStager(options)
        self._staged: Future[Any] | None = None
        self._saved: Future[Any] | None = None
        self.size_bytes = training.state_bytes

    def agree(self) -> None: ...

    def take(self) -> bool:
        self.settle()
        answer = async_save(
            self._training.state_dict(),
            storage_writer=FileSystemWriter(self._folder),
            async_checkpointer_type=self._type,
            async_stager=self._stager,
        )
        if isinstance(answer, AsyncSaveResponse):
            self._staged, self._saved = answer.staging_completion, answer.upload_completion
        else:
            self._saved = answer
        return True

    def mutable(self) -> None:
        if self._staged is not None:
            self._staged.result(LIMIT_S)

    def settle(self) -> None:
        if self._saved is not None:
            self._saved.result(LIMIT_S)

    def close(self) -> None:
        self.settle()
        if self._stager is not None:
            self._stager.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class DlRover:
    """Flash checkpoint, into shared memory only. Each rank stands for a node of its own, as ours do."""

    def __init__(self, training: Training, folder: Path) -> None:
        """`fork_dlrover` must have been called."""
        from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType  # type: ignore[import-not-found]
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer  # type: ignore[import-not-found]

        self._training = training
        self._memory = StorageType.MEMORY
        self._checkpointer = DdpCheckpointer(str(folder))
        self._step = 0
        self.size_bytes = training.state_bytes

    def agree(self) -> None: ...

    def take(self) -> bool:
        self._step += 1
        self._checkpointer.save_checkpoint(self._step, self._training.state_dict(), storage_type=self._memory)
        return bool(self._checkpointer._engine._cached_step == self._step)

    def mutable(self) -> None: ...

    def settle(self) -> None: ...

    def close(self) -> None:
        engine = self._checkpointer._engine
        engine._shm_handler.unlink()
        engine.close()


def fork_dlrover(sockets: Path, rank: int, world: int) -> None:
    """Starts its helper: early, since forking a process of many threads may leave the helper with a held lock."""
    os.environ.update(
        TORCHELASTIC_RUN_ID=f"bench-{os.getppid()}-{rank}",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        GROUP_RANK=str(rank),
        GROUP_WORLD_SIZE=str(world),
    )
    from dlrover.python.common import multi_process  # type: ignore[import-not-found]
    from dlrover.python.common.log import default_logger  # type: ignore[import-not-found]
    from dlrover.trainer.torch.flash_checkpoint import engine  # type: ignore[import-not-found]

    default_logger.setLevel("ERROR")
    multi_process.SOCKET_TMP_DIR = f"{sockets}/"
    engine.CheckpointEngine.saver_proc = engine.start_saver_process()


class TorchSave:
    """`torch.save`, without fsync."""

    def __init__(self, training: Training, path: Path) -> None:
        self._training, self._path = training, path
        self.size_bytes = training.state_bytes

    def agree(self) -> None: ...

    def take(self) -> bool:
        torch.save(self._training.state_dict(), self._path)
        return True

    def mutable(self) -> None: ...

    def settle(self) -> None:
        self._path.unlink(missing_ok=True)  # memory is short

    def close(self) -> None: ...


class Memcpy:
    """The floor: the C library copies the bytes of as many tensors as ours does, into memory of the same kind."""

    def __init__(self, training: Training, path: Path) -> None:
        self.size_bytes = training.state_bytes // dist.get_world_size()
        self._path = path
        self._mapped = reserve(path, self.size_bytes)
        self._target = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped))
        self._pieces = []
        left = self.size_bytes
        for tensor in training.tensors():
            self._pieces.append((tensor, min(tensor.nbytes, left)))
            left -= self._pieces[-1][1]
        self.take()

    def agree(self) -> None: ...

    def take(self) -> bool:
        at = self._target
        for tensor, length in self._pieces:
            ctypes.memmove(at, tensor.data_ptr(), length)
            at += length
        return True

    def mutable(self) -> None: ...

    def settle(self) -> None: ...

    def close(self) -> None:
        self._path.unlink()
