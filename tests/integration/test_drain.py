"""Ranks leave in time: nothing is aborted, nothing is computed again, and nothing is left on the node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import resilient
from actors import launch
from tests.integration.loops import Noisy, train
from tests.integration.nodes import add_spots, only_spots
from tests.integration.processes import Watched, disturbances, until
from tests.integration.test_chaos import command
from tests.integration.test_checkpoints import complete

STEPS = 150
SNAPSHOT = resilient.Snapshot(every=5)


class Audited(Noisy):
    """Notes every sample that is read for training: its index, by appending to a file."""

    def __getitem__(self, index: int) -> Any:
        assert self.audit is not None
        descriptor = os.open(self.audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{index}\n".encode())
        os.close(descriptor)
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result, and how often each sample was read."""
    audit = str(tmp_path_factory.mktemp("undisturbed") / "reads")
    return train("alone").local(steps=STEPS, dataset=Audited(audit)), reads(audit)


def reads(audit: str) -> Counter[str]:
    return Counter(Path(audit).read_text().split())


def drained(recoveries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [item for item in recoveries if item["kind"] == "drained"]


def gone(run: Watched, node: str) -> bool:
    """Whether nothing of the run is on this node."""
    folders = list(Path(launch.FOLDER).glob(f"{run.name}-*{node[:12]}*"))
    return not run.keeper_names(node) and not folders and all(where != node for _, where in run.ranks())


def check(run: Watched, undisturbed: Any, audit: str) -> Any:
    """Nothing but drains and joins, and what was computed was computed once."""
    alone, read_alone = undisturbed
    result = run.result()
    assert result.digest == alone.digest
    assert [row["loss"] for row in result.metrics] == [row["loss"] for row in alone.metrics]
    assert {item["kind"] for item in disturbances(result.recoveries)} <= {"drained", "joined"}, result.recoveries
    assert all(item["replayed"] == 0 and not item["lost"] for item in result.recoveries)
    assert reads(audit) == read_alone
    return result


def node_ends(cluster: Any, node: str, in_s: int) -> None:
    """As an autoscaler or a cloud's preemption notice says it."""
    told = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id", node]
    told += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    told += ["--deadline-remaining-seconds", str(in_s)]
    subprocess.run(told, check=True, capture_output=True, timeout=60)


def test_a_node_is_drained_by_the_command(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    audit = str(tmp_path / "reads")
    main = train("drained", workers=(1, 3), snapshot=SNAPSHOT)
    run = Watched(main, steps=STEPS, hold=str(tmp_path / "go"), dataset=Audited(audit))
    run.at_step(4, ranks=3)
    run.until_protected(1)
    node = run.ranks()[0][1]
    done = command(cluster, "drain", node[:10], "--run", "drained", "--json")
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["runs"][0]["state"] == "drained", done.stdout
    assert gone(run, node), (run.keeper_names(node), run.ranks())
    step = run.news["step"]
    run.at_step(step + 3)
    result = check(run, undisturbed, audit)
    assert len(drained(result.recoveries)) == 1


def saver_of(run: Watched, node: str) -> psutil.Process:
    """The process that makes the snapshots of this node durable."""
    (name,) = run.keeper_names(node)
    keeper = psutil.Process(ray.get(launch.find(name).process.remote(), timeout=30))
    (saver,) = (child for child in keeper.children() if "actors.saver" in child.cmdline())
    return saver


@pytest.mark.long
def test_a_node_is_let_go_when_its_part_of_a_checkpoint_is_on_storage(
    cluster: Any, undisturbed: Any, tmp_path: Path
) -> None:
    """Its rank leaves at once, and training goes on; the keeper stays while storage stalls."""
    audit, url = str(tmp_path / "reads"), tmp_path / "checkpoints"
    checkpoint = resilient.Checkpoint(str(url), every=60)
    main = train("drained-saving", workers=(1, 3), snapshot=resilient.Snapshot(every=1), checkpoint=checkpoint)
    run = Watched(main, steps=STEPS, hold=str(tmp_path / "go"), dataset=Audited(audit))
    run.at_step(3, ranks=3)
    node = run.ranks()[1][1]
    saver = saver_of(run, node)
    saver.suspend()
    try:
        run.at_step(62)
        run.controller.drain.remote(node)
        run.until(lambda news: drained(news["recoveries"]), "its rank has left")
        run.until(lambda _: waits_for(run, node) == "its keeper to finish", "nothing else is waited for")
        run.at_step(run.news["step"] + 3, ranks=2)
        assert run.keeper_names(node) and complete(url) == []
    finally:
        saver.resume()
    run.until_said("is drained: nothing of the run is on it")
    assert gone(run, node)
    run.until(lambda news: news["checkpoints"]["durable"] == 60, "what it had a part of is durable")
    result = check(run, undisturbed, audit)
    assert result.checkpoints["failures"] == 0, result.checkpoints
    assert complete(url)[0] == 60, "the one that was being written"


def waits_for(run: Watched, node: str) -> str:
    return str(ray.get(run.controller.look.remote(), timeout=30)["leaving"][node]["waits_for"])


@pytest.mark.long
def test_a_node_that_the_cluster_drains_ends_by_itself(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """A rank is started elsewhere, and takes its place in the same step. The raylet ends as soon as it is idle."""
    audit = str(tmp_path / "reads")
    main = train("noticed", workers=2, resources={"CPU": 1, "spot": 1}, snapshot=SNAPSHOT)
    with only_spots(cluster, 1, 1, 1):
        run = Watched(main, steps=STEPS, hold=str(tmp_path / "go"), dataset=Audited(audit))
        run.at_step(3, ranks=2)
        node = run.ranks()[1][1]
        node_ends(cluster, node, 90)
        run.until_said("is drained: nothing of the run is on it")
        assert gone(run, node)
        until(lambda: not [one for one in ray.nodes() if one["NodeID"] == node and one["Alive"]], "the raylet ends")
        run.at_step(run.news["step"] + 3, ranks=2)
        result = check(run, undisturbed, audit)
    (change,) = drained(result.recoveries)
    assert change["ranks"] == 2 and "1 left" in change["reason"] and "1 joined" in change["reason"]


@pytest.mark.long
def test_sigterm_to_a_rank_and_to_a_keeper(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """The rank leaves, and its node may get another one; the keeper's whole node leaves."""
    audit = str(tmp_path / "reads")
    main = train("terminated", workers=(1, 3), snapshot=SNAPSHOT)
    run = Watched(main, steps=STEPS, hold=str(tmp_path / "go"), dataset=Audited(audit))
    run.at_step(3, ranks=3)
    pid = run.signal_rank(0, signal.SIGTERM)
    run.until(lambda news: drained(news["recoveries"]), "the rank has left")
    until(lambda: not psutil.pid_exists(pid), "its process has ended")
    node = run.ranks()[0][1]
    (name,) = run.keeper_names(node)
    os.kill(ray.get(launch.find(name).process.remote(), timeout=30), signal.SIGTERM)
    run.until_said("is drained: nothing of the run is on it")
    assert gone(run, node)
    result = check(run, undisturbed, audit)
    assert len(drained(result.recoveries)) == 2


@pytest.mark.long
def test_a_node_that_cannot_be_left_is_left_when_there_is_room(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """The command says why it can't be. What was asked for outlives the controller."""
    audit = str(tmp_path / "reads")
    main = train("stuck", workers=2, resources={"CPU": 1, "spot": 1}, snapshot=SNAPSHOT)
    with only_spots(cluster, 1, 1):
        run = Watched(main, steps=STEPS, hold=str(tmp_path / "go"), dataset=Audited(audit))
        run.at_step(3, ranks=2)
        node = run.ranks()[0][1]
        refused = command(cluster, "drain", node, "--run", "stuck")
        assert refused.returncode == 1, refused
        assert "1 of at least 2 workers would be left, and there is no room elsewhere: add nodes" in refused.stdout
        run.kill_controller()
        run.until_said("restarted")
        add_spots(cluster, 1)
        run.until_said("is drained: nothing of the run is on it")
        assert gone(run, node)
        check(run, undisturbed, audit)
