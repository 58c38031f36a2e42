"""NCCL's stand-in on machines without a device."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from torch import Tensor

LIMIT_S = 30.0


class Nccl:
    """Has the signatures of a c10d Backend that is ProcessGroupNCCL. Given a gloo, that carries the bytes."""

    def __init__(self, gloo: Any = None) -> None:
        self.gloo, self.batches = gloo, list[list[str]]()
        self._works: list[Any] = []
        self.error, self.aborting, self.may_abort = "SUCCESS", threading.Event(), threading.Event()

    def _start_coalescing(self) -> None:
        self.batches.append([])

    def _end_coalescing(self) -> Any:
        works, self._works = self._works, []
        return SimpleNamespace(wait=lambda: [work.wait() for work in works]) if self.batches[-1] else None

    def send(self, data: list[Tensor], peer: int, tag: int) -> None:
        self.batches[-1].append("send")
        self._begin("send", data, peer, tag)

    def recv(self, data: list[Tensor], peer: int, tag: int) -> None:
        self.batches[-1].append("recv")
        self._begin("recv", data, peer, tag)

    def _begin(self, kind: str, data: list[Tensor], peer: int, tag: int) -> None:
        if self.gloo is not None:
            self._works.append(getattr(self.gloo, kind)(data, peer, tag))

    def allreduce(self, data: list[Tensor], options: Any) -> Any:
        return self.gloo.allreduce(data, options)

    def get_error(self) -> Any:
        return SimpleNamespace(name=self.error)

    def abort(self) -> None:
        self.aborting.set()
        assert self.may_abort.wait(LIMIT_S)
