"""Copying a share of the state into its slot, while the next step computes and nothing may write what is copied."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from snapshot.arena import Slot
from snapshot.core.lifecycle import Ordinal

from .verification import StateDigest

LARGE_BYTES = 4 << 20

_VERSION: Callable[[Tensor], int] = attrgetter("_version")


@dataclass(slots=True, kw_only=True, eq=False)
class Copy:
    ordinal: Ordinal
    slot: Slot
    targets: list[Tensor]
    sources: list[Tensor]
    watched: list[Tensor]
    """What must not be written meanwhile."""
    ready: Any
    """CUDA: the work that the state still depends on; else None."""
    digesting: StateDigest | None
    digest: int | None = None
    """Of the whole state, once it is done."""
    done: threading.Event = field(default_factory=threading.Event)
    _versions: list[int] = field(init=False)
    """Of what is watched."""

    def __post_init__(self) -> None:
        self._versions = list(map(_VERSION, self.watched))

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing has written the state since."""
        return list(map(_VERSION, self.watched)) == self._versions

    def finish(self) -> str:
        """Copy, and commit the slot; why the copy is of no use, empty if it is whole."""
        try:
            why = self._run()
            self.slot.invalidate() if why else self.slot.commit()
        except BaseException as error:  # noqa: BLE001  whatever it is: training must not wait for this copy for ever
            why = f"copying failed: {error!r}"
            with contextlib.suppress(Exception):  # then it has no commit word either
                self.slot.invalidate()
        return why

    def _run(self) -> str:
        if self.ready is not None:
            self._from_device()
        else:
            self._on_host()
        if not self.is_unchanged:
            return (
                "the state was written while it was copied: change parameters and optimizer state only in "
                "committing iterations"
            )
        return ""

    def finish_digest(self) -> None:
        """Of the same state that was copied: none if it has been written meanwhile. Raises RuntimeError if it can't be
        made: there is no memory on the device, say."""
        if self.digesting is not None:
            if self.ready is not None:
                self.ready.synchronize()  # this thread has another stream than the one that writes the state, perhaps
            digest = self.digesting.finish()
            self.digest = digest if self.is_unchanged else None

    def _on_host(self) -> None:
        """Large pieces by the C library, which writes past the caches: a tenth faster. The others in one call, since
        each call may have to wait until the training thread lets go of Python's lock."""
        pairs = list(zip(self.targets, self.sources, strict=True))
        small = [pair for pair in pairs if pair[0].numel() < LARGE_BYTES]
        if small:
            torch._foreach_copy_([target for target, _ in small], [source for _, source in small])
        for target, source in pairs:
            if target.numel() >= LARGE_BYTES:
                ctypes.memmove(target.data_ptr(), source.data_ptr(), target.numel())

    def _from_device(self) -> None:
        """On a stream of its own, beside the next step's kernels."""
        # An optimizer may keep some of its state on the host.
        device = next((source.device for source in self.sources if source.device.type != "cpu"), None)
        if device is None:
            self.ready.synchronize()
            self._on_host()
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(self.ready)
            for target, source in zip(self.targets, self.sources, strict=True):
                target.copy_(source, non_blocking=True)
            stream.synchronize()
