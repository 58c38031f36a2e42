"""Nodes that come and go during a test, and the end of a host."""

from __future__ import annotations

import contextlib
import gc
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from actors import launch
from tests.integration.processes import until

START_CHANCES = 3
"""Ray gives a node's agents 15 s to start, come what may; on a busy machine they may take longer."""


def add_node(cluster: Any, **options: Any) -> Any:
    """One more raylet; started again where Ray's own limit was too short for this machine."""
    for _ in range(START_CHANCES - 1):
        before = set(psutil.Process().children())
        with contextlib.suppress(Exception):  # all that Ray raises here is a plain Exception
            return cluster.add_node(**options)
        for process in set(psutil.Process().children()) - before:
            process.kill()  # it might come up after all, and take ranks that the test expects elsewhere
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()  # Ray leaves sockets of its failed start open: they must not fail another test
    return cluster.add_node(**options)


def add_spots(cluster: Any, count: int) -> Any:
    """A node with room for so many ranks of runs that ask for a `spot`."""
    return add_node(cluster, num_cpus=2, object_store_memory=80 << 20, resources={"spot": count})


@contextlib.contextmanager
def only_spots(cluster: Any, *counts: int) -> Iterator[list[Any]]:
    """Such nodes, while this lasts: there are no others, and afterwards none is left."""
    assert not _spots(), "another test has left nodes of its own"
    before = set(cluster.worker_nodes)
    try:
        yield [add_spots(cluster, count) for count in counts]
    finally:
        for node in set(cluster.worker_nodes) - before:
            cluster.remove_node(node, allow_graceful=False)
        until(lambda: not _spots(), "the cluster has noticed that they are gone", 60)


def _spots() -> float:
    return float(sum(node["Resources"].get("spot", 0.0) for node in ray.nodes() if node["Alive"]))


def raylet_of(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def kill_host(*nodes: Any, also: tuple[int, ...] = ()) -> None:
    """All that a power cut would end: raylets and their children, in the same instant, and their memory.

    also: further processes that are to end with them.
    """
    raylets = [raylet_of(node) for node in nodes]
    processes = [psutil.Process(pid) for pid in also]
    # The raylets last: the kernel wakes stopped children whose parent dies, and a keeper could still say something.
    processes += [process for raylet in raylets for process in [*raylet.children(recursive=True), raylet]]
    for sign in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sign)
    for node in nodes:
        for folder in Path(launch.FOLDER).glob(f"*-{node.node_id[:12]}"):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def another_cluster(head: str | None = None, **settings: Any) -> Iterator[Any]:
    """A cluster of its own, with a head that has no room for ranks, instead of the one that is connected to.

    head: its address, if it is not to be the machine's.
    """
    former = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
    ray.shutdown()
    cluster = Cluster()
    try:
        options = {} if head is None else {"node_ip_address": head}
        add_node(
            cluster,
            num_cpus=0,
            object_store_memory=80 << 20,
            **options,
            _system_config={"prestart_worker_first_driver": False, **settings},
        )
        ray.init(address=cluster.address, log_to_driver=False, _node_ip_address=head)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        if former is not None:
            ray.init(address=former, log_to_driver=False)
