"""One real Ray cluster of four raylets for all integration tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

NODES = 4
START_CHANCES = 3
"""Ray gives a node's agents 15 s to start, come what may; on a busy machine they may take longer."""


def add_node(cluster: Any, **options: Any) -> Any:
    """One more raylet; started again where Ray's own limit was too short for this machine."""
    for _ in range(START_CHANCES - 1):
        with contextlib.suppress(Exception):  # all that Ray raises here is a plain Exception
            return cluster.add_node(**options)
    return cluster.add_node(**options)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 80 << 20}
    cluster = Cluster()
    settings = {
        "prestart_worker_first_driver": False,
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 4,
    }
    try:
        add_node(cluster, **node, _system_config=settings)
        for _ in range(NODES - 1):
            add_node(cluster, **node)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
