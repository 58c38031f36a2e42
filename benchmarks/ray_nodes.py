"""A Ray cluster of a contestant's own: a head without room for ranks, and nodes with one place each."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import psutil

SETTINGS = {
    "prestart_worker_first_driver": False,
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
"""Ray's own detection, as quick as it is advised to be."""
CHANCES = 3


def start(nodes: int) -> Any:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    add(cluster, num_cpus=2, object_store_memory=80 << 20, _system_config=SETTINGS)
    for _ in range(nodes):
        add_place(cluster)
    ray.init(address=cluster.address, log_to_driver=False)
    return cluster


def add_place(cluster: Any) -> Any:
    return add(cluster, num_cpus=2, object_store_memory=80 << 20, resources={"place": 1})


def add(cluster: Any, **options: Any) -> Any:
    """On a busy machine Ray's own limit for a node's start may be too short: tried again."""
    for _ in range(CHANCES - 1):
        before = set(psutil.Process().children())
        with contextlib.suppress(Exception):  # all that Ray raises here is a plain Exception
            return cluster.add_node(**options)
        for process in set(psutil.Process().children()) - before:
            process.kill()
    return cluster.add_node(**options)
