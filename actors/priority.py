"""Ray starts its workers with low priority (nice 15), which is wrong for those that others wait for.

Keepers and the controller must be heard in time on a machine that is busy with other things. A rank
gets normal priority once it has reached its loop; until then it imports and builds, at about a third of
the weight of those that train: at Ray's own thirtieth it would take a minute on a busy machine. Where
the system doesn't allow it (it takes CAP_SYS_NICE), all stays as it was; `RAY_worker_niceness=0` in the
cluster's environment then has the same effect.
"""

from __future__ import annotations

import contextlib
import os

NORMAL, STARTING = 0, 5


def raise_priority(nice: int = NORMAL) -> None:
    """Give every thread of this process this nice value, where that is allowed."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(PermissionError, ProcessLookupError):  # not allowed, or just ended
            os.setpriority(os.PRIO_PROCESS, int(thread), nice)
