"""What a DataLoader's worker process does first: it must neither outlive its rank nor seem to be it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import get_worker_info

from .packing import ForProcess

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class WorkerStart:
    method: str
    parent: int
    then: Callable[[int], None] | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _start, (self.method, self.parent, ForProcess(self.then))

    def __call__(self, worker: int) -> None:
        if self.method == "forkserver":
            # A fork server and its children keep each other alive; only this pipe tells that the rank died.
            threading.Thread(target=_die_with_parent, daemon=True).start()
        elif sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self.parent:
                os._exit(1)  # the rank died before that
            if self.method == "fork":
                _release_inherited_sockets()
        info = get_worker_info()
        assert info is not None
        recipe: Any = info.dataset
        object.__setattr__(info, "dataset", recipe.dataset)  # the user's, for worker_init_fn
        if self.then is not None:
            self.then(worker)


def _start(method: str, parent: int, then: Callable[[int], None] | None) -> WorkerStart:
    return WorkerStart(method=method, parent=parent, then=then)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _release_inherited_sockets() -> None:
    """Let go of all TCP and UDP sockets: held by a worker, they keep a dead rank's connections open.

    Their numbers go on pointing somewhere (/dev/null): the objects that own them here would later close
    whatever had got the number since. Unix sockets, over which workers return tensors, stay.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # no socket, or the descriptor of the listing itself
            probe = socket.socket(fileno=descriptor)
            family = probe.family
            probe.detach()
            if family in (socket.AF_INET, socket.AF_INET6):
                os.dup2(null, descriptor, inheritable=False)
    os.close(null)
