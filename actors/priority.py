"""Ray starts its workers with low priority (nice 15), which is wrong for those that others wait for.

Keepers and the controller must be heard in time on a machine that is busy with other things. A rank
gets normal priority once it has reached its loop; until then it imports and builds, at about a third of
the weight of those that train: at Ray's own thirtieth it would take a minute on a busy machine. Where
the system doesn't allow it (it takes CAP_SYS_NICE), all stays as it was; `RAY_worker_niceness=0` in the
cluster's environment then has the same effect.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading

NORMAL, STARTING, LOWEST = 0, 5, 19


_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS, _IOPRIO_IDLE = 1, 3 << 13


def lowest_priority() -> None:
    """The calling thread, and those that it starts, run and use disks only when nobody else wants to. Not for a
    thread beside others that are waited for: it may hold Python's lock while it waits for a core."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, LOWEST)
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, thread, _IOPRIO_IDLE)


def raise_priority(nice: int = NORMAL) -> None:
    """Give every thread of this process this nice value, where that is allowed."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(PermissionError, ProcessLookupError):  # not allowed, or just ended
            os.setpriority(os.PRIO_PROCESS, int(thread), nice)
