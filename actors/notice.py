"""SIGTERM asks a process to leave: it says so, and goes on until it is released or its grace is over.

Ray's own handler would end a worker at once. Python runs handlers in the main thread, which may be deep in Ray's loop;
so the kernel wakes a thread through a descriptor.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

GRACE_S = 30.0
"""What Kubernetes gives by default between SIGTERM and SIGKILL."""
REPEAT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveAsked:
    """A node (member 0) or a rank is to leave, and lives for `left_s` yet."""

    node: str
    member: int
    why: str
    left_s: float


class Notice:
    """Made in the main thread, once in a process. `tell` is called at SIGTERM, and again from time to time, with the
    seconds that are left; then the process ends."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._bell, self._ringer = socket.socketpair()
        self._ringer.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(self._ringer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(before=_hold, after_in_parent=_let_through, after_in_child=_as_before)
        threading.Thread(target=self._wait, name="notice", daemon=True).start()

    def _wait(self) -> None:
        while signal.SIGTERM not in self._bell.recv(64):
            pass
        until = time.monotonic() + GRACE_S
        while (left_s := until - time.monotonic()) > 0:
            self._tell(left_s)
            time.sleep(min(REPEAT_S, left_s))
        os._exit(0)


_held = threading.local()


def _hold() -> None:
    """A child that is hit before it is a process of its own would ring its parent's bell."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _as_before() -> None:
    """A child, such as a worker that loads data, ends at SIGTERM, and does not speak for its parent."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_through()
