"""SIGTERM asks a process to leave: another process, with Ray's own handler in place before."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

PROCESS = """
import os, signal, sys, threading, time
from actors import notice
notice.GRACE_S, notice.REPEAT_S = float(sys.argv[1]), 0.05
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
said = notice.Notice(lambda left_s: print(f"{left_s:.2f}", flush=True))
child = os.fork()
if child == 0:
    signal.pause()
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
print("child", os.WTERMSIG(status) if os.WIFSIGNALED(status) else -1, flush=True)
lock = threading.Lock()
lock.acquire()
lock.acquire()  # as Ray's loop: no Python code runs in the main thread any more
"""


@contextlib.contextmanager
def started(grace_s: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROCESS, str(grace_s)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"child {int(signal.SIGTERM)}\n", "it ends at SIGTERM, in silence"
            process.send_signal(signal.SIGTERM)
            yield process
        finally:
            process.kill()


def test_it_says_so_and_goes_on_until_its_grace_is_over() -> None:
    with started(0.3) as process:
        said, _ = process.communicate(timeout=60)
        left = [float(line) for line in said.split()]
        assert process.returncode == 0
        assert left and left == sorted(left, reverse=True) and 0 < left[-1] <= left[0] <= 0.3


def test_it_says_so_again_and_again() -> None:
    with started(600.0) as process:
        assert process.stdout is not None
        left = [float(process.stdout.readline()) for _ in range(3)]
        assert left == sorted(left, reverse=True) and process.poll() is None
