"""A cluster of several nodes on one machine, and what is done to it: the demo's victim.

Every node is a raylet of its own with its workers, as on separate machines. Whatever happens, nothing
stays behind: this process adopts all that its children leave orphaned, so at the end it can find and
end them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import shutil
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from actors.processes import send_signal

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False, "dashboard_port": 0}
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
START_CHANCES = 3
END_LIMIT_S = 10.0


class LocalCluster:
    """A context: nodes are up within it, and everything has ended after it."""

    def __init__(self, nodes: int) -> None:
        # Read when ray is imported. A token of our own: nobody else may run code on this machine meanwhile.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._size = nodes
        self._cluster: Any = None
        self._not_mine: list[psutil.Process] = []

    def __enter__(self) -> LocalCluster:
        from ray.cluster_utils import Cluster

        logging.getLogger("ray").setLevel(logging.ERROR)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # Not shutdown_at_exit: it would move this process out of the terminal's process group, deaf to Ctrl-C.
        self._cluster = Cluster(shutdown_at_exit=False)
        self._not_mine = psutil.Process().children(recursive=True)
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def _start(self) -> None:
        import ray

        self._add_node(_system_config=QUICK_HEALTH_CHECKS)
        for _ in range(self._size - 1):
            self._add_node()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)

    def _add_node(self, **head: Any) -> Any:
        """One at a time, and again where it fails: Ray gives a node's agents 15 s to start, come what may.

        On a busy machine they take longer (https://github.com/ray-project/ray/issues/65983).
        """
        for chance in range(START_CHANCES):
            before = psutil.Process().children()
            try:
                return self._cluster.add_node(**NODE, **head)
            except Exception:  # all that Ray raises here is a plain Exception
                if chance == START_CHANCES - 1:
                    raise
                end(with_descendants(child for child in psutil.Process().children() if child not in before))
        raise AssertionError

    def __exit__(self, *exception: object) -> None:
        self._end()

    def _end(self) -> None:
        """Ctrl-C is not listened to meanwhile: what was begun here must be finished."""
        import ray

        with _without_interrupts():
            ray.shutdown()
            with contextlib.suppress(Exception):  # of nodes already dead; the sweep below is what counts
                self._cluster.shutdown()
            end([process for process in psutil.Process().children(recursive=True) if process not in self._not_mine])

    @property
    def head(self) -> str:
        """Id of the node that controller and driver are on."""
        return str(self._cluster.head_node.node_id)

    def add_node(self) -> str:
        """A new machine arrives; its id."""
        return str(self._add_node().node_id)

    def lose_node(self, node_id: str) -> int:
        """The machine disappears: raylet and all its processes in the same instant, and what its runs have in
        memory. Returns how many."""
        from actors.launch import FOLDER

        from .chaos import end_at_once, forget_memory

        (node,) = (node for node in self._cluster.worker_nodes if node.node_id == node_id)
        started = [info.process.pid for kind in node.all_processes.values() for info in kind]
        victims = with_descendants(psutil.Process(pid) for pid in started if psutil.pid_exists(pid))
        end_at_once(reversed(victims))
        forget_memory(FOLDER, node_id)
        self._cluster.worker_nodes.discard(node)
        return len(victims)


def with_descendants(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """These, and all that they have started."""
    found = list(processes)
    return found + [child for process in found for child in process.children(recursive=True)]


def end(processes: Sequence[psutil.Process]) -> None:
    """Kill them all at once, and wait until they are gone."""
    for process in processes:
        send_signal(process, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=END_LIMIT_S)


def remove_files(folder: str, prefix: str) -> None:
    """What dead nodes of this machine can't remove any more."""
    for path in Path(folder).glob(f"{prefix}*"):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or not empty: other runs are using it
        Path(folder).rmdir()


class _without_interrupts:
    """Ctrl-C and SIGTERM are ignored within it. Only of use in the main thread."""

    def __enter__(self) -> None:
        self._before = {sign: signal.signal(sign, signal.SIG_IGN) for sign in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *exception: object) -> None:
        for sign, action in self._before.items():
            signal.signal(sign, action)
