"""The cluster's head is away for a while: its `gcs_server`, whose memory is a Redis of the test's own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import resilient
from tests.integration.loops import train
from tests.integration.nodes import add_spots, another_cluster
from tests.integration.processes import Watched, disturbances, until
from tests.integration.test_detection import PACE_S, identical, newest_step, why_lost

pytestmark = pytest.mark.long

LONG = 400
DETECTION_S = 1.0


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For Ray heads that are started meanwhile."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.fail("redis-server is missing: `make test-long` installs it, or `apt-get install redis-server`")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        until(lambda: answers(port), "Redis answers", 20)
        monkeypatch.setenv("RAY_REDIS_ADDRESS", f"127.0.0.1:{port}")
        yield
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


@pytest.fixture
def headed(redis: None) -> Iterator[Any]:
    """A cluster with two nodes for ranks beside its head."""
    with another_cluster() as cluster:
        for _ in range(2):
            add_spots(cluster, 2)
        yield cluster


def test_training_goes_on_without_a_head_and_what_needs_one_waits(headed: Any, tmp_path: Path) -> None:
    undisturbed = train("alone").local(steps=LONG)
    function = train(
        "beheaded",
        workers=(1, 3),
        resources={"CPU": 1, "spot": 1},
        detection_s=DETECTION_S,
        snapshot=resilient.Snapshot(every=1),
    )
    run = Watched(function, steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=3)
    controller = ray.get(run.controller.process.remote(), timeout=30)
    pids = [run.pid_of_rank(rank) for rank in range(3)]
    headed.head_node.kill_gcs_server()
    enough = newest_step("beheaded") + int(3 * DETECTION_S / PACE_S)
    until(lambda: newest_step("beheaded") >= enough, "training goes on")
    assert not disturbances(run.news["recoveries"]) and run.news["step"] > 4, "the driver hears of it, too"
    os.kill(pids[1], 9)
    run.until_said("the cluster's head has not answered")
    headed.head_node.start_gcs_server()
    run.until_said("the cluster's head answers again")
    run.until_recovered(2, ranks=3)
    run.signal_rank(0)
    run.until_recovered(4, ranks=3)
    assert ray.get(run.controller.process.remote(), timeout=30) == controller, "it has lived through all of it"
    result = identical(run, undisturbed)
    assert why_lost(result) == ["the process has ended"] * 2, result.recoveries
