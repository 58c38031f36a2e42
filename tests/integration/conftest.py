"""One real Ray cluster of four raylets for all integration tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import end_what_goes_on

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ["RESILIENT_DIR"] = str(Path(__file__).parents[2] / "out" / "runs")

NODES = 4
END_LIMIT_S = 10.0


@pytest.fixture(autouse=True)
def no_run_goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test leaves training on the shared cluster would take the places of all that follow: it is ended, and the
    test that left it fails."""
    yield
    if "cluster" in request.fixturenames:
        left = end_what_goes_on(END_LIMIT_S)
        assert not left, f"{request.node.nodeid} has left {', '.join(left)} training"


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
