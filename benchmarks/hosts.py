"""Whole hosts that end or stand still: a rank's raylet with all its processes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable

import psutil


def host_of(pid: int) -> list[psutil.Process]:
    """The raylet above a rank with all its processes, itself last; without one, the process alone."""
    raylet = psutil.Process(pid).parent()
    if raylet is None or raylet.name() != "raylet":
        return [psutil.Process(pid)]
    return [*raylet.children(recursive=True), raylet]


def kill_hosts(pids: Iterable[int]) -> None:
    """Those of these ranks, all in the same moment."""
    processes = [process for pid in pids for process in host_of(pid)]
    send(processes, signal.SIGSTOP)
    send(processes, signal.SIGKILL)


def send(processes: list[psutil.Process], sign: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(sign)
