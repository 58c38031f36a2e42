"""When something happened, for another process to read: clocks of the wall may be set, by minutes, at any time.

On one host the time since it was started tells how long ago that was; between hosts there is only the wall clock.
"""

from __future__ import annotations

import time
from typing import Any

from .processes import place

EARLIEST_WALL_S = 1e9
"""Seconds of the wall clock are more, those since a host was started are less: thirty years."""


def boot_s() -> float:
    """Seconds since this host was started, time asleep counted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def moment() -> dict[str, Any]:
    """Now, as JSON."""
    return {"boot": place().partition(" ")[0], "boot_s": boot_s(), "at": time.time()}


def since_s(record: dict[str, Any]) -> float:
    """How long ago a moment was, in seconds; never less than nothing. Older versions wrote only `at`."""
    if record.get("boot") == place().partition(" ")[0] != "unknown":
        return max(0.0, boot_s() - float(record["boot_s"]))
    return max(0.0, time.time() - float(record["at"]))


def since_stamp_s(stamp: float) -> float:
    """The same of a file's time: seconds since the host was started, or, as older versions left it, of the wall."""
    return (time.time() if stamp > EARLIEST_WALL_S else boot_s()) - stamp
