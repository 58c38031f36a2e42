"""One real Ray cluster of four raylets for all integration tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ["RESILIENT_DIR"] = str(Path(__file__).parents[2] / "out" / "runs")

NODES = 4


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    from tests.integration.nodes import add_node

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
