"""A network that fails: cables that are cut, or carry one way only, or are slow. Each node has a network of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors import launch
from tests.integration.loops import train
from tests.integration.nodes import another_cluster
from tests.integration.processes import Watched, is_training, until
from tests.integration.switch import Network
from tests.integration.test_detection import identical, nobody_was_blamed, why_lost

pytestmark = pytest.mark.long

LONG = 400
"""Steps; at the pace that `hold` keeps, two minutes."""
SLOW, FEW = 60, 20
HEAD = "10.77.0.1"
WORKERS = ("10.77.0.2", "10.77.0.3", "10.77.0.4")
PATIENT_HEAD = {"health_check_period_ms": 1000, "health_check_timeout_ms": 3000, "health_check_failure_threshold": 5}
"""Ray takes a node for dead that does not answer for 15 to 20 s: long after this runtime has."""


class Nodes:
    """A head in the network that all processes here share, and workers in namespaces, each with room for one rank."""

    def __init__(self, cluster: Any, network: Network) -> None:
        self._cluster, self.network = cluster, network
        self._starters: list[subprocess.Popen[bytes]] = []

    def add(self, port: int) -> None:
        """One after the other: two that start at once choose the same sockets in the file system that they share."""
        ray_program = str(Path(sys.executable).with_name("ray"))
        options = ["--num-cpus=2", "--object-store-memory=80000000", '--resources={"wired":1}', "--block"]
        self._starters.append(
            subprocess.Popen(
                [
                    *("nsenter", f"--net={self.network.namespace(port)}", ray_program, "start"),
                    *(f"--address={self._cluster.address}", f"--node-ip-address={WORKERS[port - 1]}", *options),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
        until(lambda: self.at(port), f"node {port} is there", 60)

    def at(self, port: int) -> list[str]:
        """Live nodes, as Ray lists them, with this port's address."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        return [node["NodeID"] for node in nodes if node["NodeManagerAddress"] == WORKERS[port - 1]]

    def all_there(self) -> None:
        """Add those that are not there."""
        self.network.lose()
        for port in range(1, len(WORKERS) + 1):
            self.network.mend(port)
            if not self.at(port):
                self.end(port)
                self.add(port)

    def port_of(self, run: Watched, rank: int) -> int:
        _, node = run.ranks()[rank]
        return next(port for port in range(1, len(WORKERS) + 1) if node in self.at(port))

    def end(self, port: int) -> None:
        for pid in self.network.inside(port):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self.network.inside(port), "they have ended", 20)

    def end_all(self) -> None:
        for port in range(1, len(WORKERS) + 1):
            self.end(port)
        for starter in self._starters:
            starter.kill()
            starter.wait()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if shutil.which("nsenter") is None:
        pytest.fail("nsenter is missing: install util-linux")
    with Network(HEAD, *WORKERS) as network, another_cluster(HEAD, **PATIENT_HEAD) as cluster:
        found = Nodes(cluster, network)
        try:
            yield found
        finally:
            found.end_all()


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    return train("alone").local(steps=LONG)


def wired(name: str, workers: int | tuple[int, int] = (1, 3)) -> Any:
    return train(name, workers=workers, resources={"CPU": 1, "wired": 1})


def begun(nodes: Nodes, name: str, tmp_path: Path, steps: int = LONG) -> Watched:
    nodes.all_there()
    run = Watched(wired(name), steps=steps, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=3)
    return run


def training_processes(nodes: Nodes, port: int) -> list[int]:
    return list(filter(is_training, nodes.network.inside(port)))


def test_a_cut_node_is_dead_and_one_that_comes_back_is_fenced(nodes: Nodes, undisturbed: Any, tmp_path: Path) -> None:
    """It comes back before Ray has noticed: the node joins again, but not its former processes."""
    run = begun(nodes, "cut", tmp_path)
    port = nodes.port_of(run, 1)
    before = training_processes(nodes, port)
    assert len(before) == 2
    nodes.network.cut(port)
    run.until_recovered(1)
    assert run.news["ranks"] == 2 and all(map(psutil.pid_exists, before))
    nodes.network.mend(port)
    until(lambda: not any(map(psutil.pid_exists, before)), "its processes have ended", 60)
    run.until(lambda news: news["ranks"] == 3, "the node has a rank again")
    result = identical(run, undisturbed)
    assert "silent" in why_lost(result)[0] and len(why_lost(result)) == 1, result.recoveries


def test_a_node_that_was_cut_for_long_comes_back_too_late(nodes: Nodes, undisturbed: Any, tmp_path: Path) -> None:
    """Ray has given it up: all its processes end themselves, and other keepers of this machine sweep its memory."""
    run = begun(nodes, "cut-off", tmp_path)
    port = nodes.port_of(run, 1)
    (node,) = nodes.at(port)
    nodes.network.cut(port)
    run.until_recovered(1)
    until(lambda: not nodes.at(port), "Ray has noticed", 60)
    nodes.network.mend(port)
    until(lambda: not training_processes(nodes, port), "its processes have ended", 60)
    until(lambda: not Path(launch.folder_of(f"{run.name}/1", node)).exists(), "its memory has been swept", 90)
    identical(run, undisturbed)


@pytest.mark.parametrize("direction", ["out", "back"])
def test_a_cable_that_carries_one_way_only(nodes: Nodes, undisturbed: Any, tmp_path: Path, direction: str) -> None:
    run = begun(nodes, f"one-way-{direction}", tmp_path)
    port = nodes.port_of(run, 1)
    nodes.network.cut(port, direction)
    run.until_recovered(1)
    result = run.result()
    assert result.digest == undisturbed.digest, run.news["messages"]
    assert len(why_lost(result)) == 1, result.recoveries
    until(lambda: not training_processes(nodes, port), "without a controller they end by their leases", 90)


def test_a_slow_cable_is_no_death(nodes: Nodes, tmp_path: Path) -> None:
    alone = train("alone").local(steps=SLOW)
    run = begun(nodes, "slow-cable", tmp_path, SLOW)
    for port in range(1, len(WORKERS) + 1):
        nodes.network.slow(port, delay_s=0.02, bits_per_s=200e6)
    result = run.result()
    assert result.digest == alone.digest
    assert nobody_was_blamed(run, result), (result.recoveries, run.news["messages"])


@pytest.mark.parametrize("ways", [2, 1])
def test_two_nodes_that_do_not_hear_each_other(nodes: Nodes, tmp_path: Path, ways: int) -> None:
    """Both reach the cluster's head and the third node: nobody falls silent, and all ranks wait."""
    alone = train("alone").local(steps=SLOW)
    run = begun(nodes, f"pair-cut-{ways}", tmp_path, SLOW)
    one, other = nodes.port_of(run, 1), nodes.port_of(run, 2)
    nodes.network.lose(*[(one, other, 1.0), (other, one, 1.0)][:ways])
    result = run.result()
    assert result.digest == alone.digest, run.news["messages"]
    assert len(why_lost(result)) == 1 and "nothing passes" in why_lost(result)[0], result.recoveries


def test_a_link_that_loses_a_third_of_all_packets(nodes: Nodes, tmp_path: Path) -> None:
    """Whether it is slow or worth nothing is for the run to find out: it ends, with the same bits."""
    alone = train("alone").local(steps=FEW)
    run = begun(nodes, "lossy", tmp_path, FEW)
    one, other = nodes.port_of(run, 1), nodes.port_of(run, 2)
    nodes.network.lose((one, other, 0.3), (other, one, 0.3))
    assert run.result().digest == alone.digest, run.news["messages"]
