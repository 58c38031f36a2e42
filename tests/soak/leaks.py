"""What grows although it should not: samples of the long-lived processes and of shared memory, and the verdict."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

EVERY_S = 1.0
JUDGED_FROM_S = 120.0
"""Processes that lived shorter than this tell nothing."""
SHOWN = 40
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limit:
    """A leak is what rises faster than `a_minute`, by more than `growth` from the second third to the last, and still
    does in the last. In the first, processes load what they need. A keeper does so only when it gets a rank, or first
    has to decode, which may be later: that is a step, and no rise."""

    a_minute: float
    growth: float


PRIVATE_MIB = Limit(a_minute=2.0, growth=8.0)
DESCRIPTORS = Limit(a_minute=5.0, growth=20.0)
SHARED_MIB = Limit(a_minute=5.0, growth=20.0)

Samples = Sequence[tuple[float, float]]
"""Seconds and values."""


def slope_a_minute(samples: Samples) -> float:
    """Of the least-squares line."""
    if len(samples) < 3:
        return 0.0
    times, values = zip(*samples, strict=True)
    return 60.0 * statistics.linear_regression(times, values).slope if len(set(times)) > 1 else 0.0


def growth(samples: Samples) -> float:
    """From one half to the other."""
    half = max(1, len(samples) // 2)
    values = [value for _, value in samples]
    return statistics.median(values[-half:]) - statistics.median(values[:half])


def judged(samples: Samples, limit: Limit) -> dict[str, Any] | None:
    """None if they are too few to tell."""
    if not samples or samples[-1][0] - samples[0][0] < JUDGED_FROM_S:
        return None
    late = samples[len(samples) // 3 :]
    rise, more, at_last = slope_a_minute(late), growth(late), slope_a_minute(samples[2 * len(samples) // 3 :])
    return {
        "a_minute": round(rise, 2),
        "a_minute_at_last": round(at_last, 2),
        "growth": round(more, 1),
        "last": round(samples[-1][1], 1),
        "seconds": round(samples[-1][0] - samples[0][0]),
        "leak": min(rise, at_last) > limit.a_minute and more > limit.growth,
        "samples": [round(value, 1) for _, value in samples[:: max(1, len(samples) // SHOWN)]],
    }


@dataclass(slots=True)
class _Seen:
    kind: str
    private: list[tuple[float, float]] = field(default_factory=list)
    descriptors: list[tuple[float, float]] = field(default_factory=list)


class Sampler(threading.Thread):
    """Looks at controllers, keepers and the driver, and at the run's files in shared memory, until it is ended."""

    def __init__(self, folders: Path, prefix: str) -> None:
        super().__init__(name="sampler", daemon=True)
        self._folders, self._prefix = folders, prefix
        self._ended = threading.Event()
        self._seen: dict[tuple[int, float], _Seen] = {}
        self._shared: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self._ended.wait(EVERY_S):
            now = time.monotonic()
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    self._look(process, now)
            self._shared.append((now, shared_mib(self._folders, self._prefix)))

    def _look(self, process: psutil.Process, now: float) -> None:
        kind = "driver" if process.pid == psutil.Process().pid else actor_kind(process)
        if kind not in ("driver", "Controller", "Keeper"):
            return
        seen = self._seen.setdefault((process.pid, process.create_time()), _Seen(kind))
        memory = process.memory_info()
        seen.private.append((now, (memory.rss - memory.shared) / MIB))
        seen.descriptors.append((now, process.num_fds()))

    def end(self) -> dict[str, Any]:
        """All that was judged."""
        self._ended.set()
        self.join()
        found: dict[str, Any] = {"shared_mib": judged(self._shared, SHARED_MIB) if self._shared else None}
        for (pid, _), seen in sorted(self._seen.items()):
            for what, samples, limit in (
                ("private_mib", seen.private, PRIVATE_MIB),
                ("descriptors", seen.descriptors, DESCRIPTORS),
            ):
                if (verdict := judged(samples, limit)) is not None:
                    found[f"{seen.kind} {pid} {what}"] = verdict
        return found


def actor_kind(process: psutil.Process) -> str:
    """Rank, Keeper, Controller; empty for what is no actor of ours."""
    command = process.cmdline()
    name = command[0].removeprefix("ray::").partition(".")[0] if command and command[0].startswith("ray::") else ""
    return name if name in ("Rank", "Keeper", "Controller") else ""


def shared_mib(folders: Path, prefix: str) -> float:
    size = 0
    for path in folders.glob(f"{prefix}*/**/*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size / MIB


def processes_left() -> list[str]:
    """Actors of ours among the descendants of this process."""
    left = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.status() != psutil.STATUS_ZOMBIE and (kind := actor_kind(process)):
                left.append(f"{kind} {process.pid}")
    return left
