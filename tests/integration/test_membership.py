"""Ranks and nodes come and go: respawns, joiners that die, spares, dead hosts, too few nodes."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import resilient
from actors import launch
from actors.rank import RankSpec
from resilient.generation import GenerationThread
from tests.integration.loops import fault, train
from tests.integration.nodes import add_spots, kill_host, only_spots
from tests.integration.processes import Watched, disturbances, until

LONG = 150
"""Steps; at the pace that `hold` keeps, long enough for new processes to start and join."""


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    return train("alone").local(steps=LONG)


class Watching:
    def watch(self, member: int, pid: int) -> None:
        pass


def kinds(result: Any) -> list[str]:
    return [item["kind"] for item in disturbances(result.recoveries)]


@pytest.mark.long
def test_joiners_that_die_while_receiving_and_once_seated(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """A rank dies; the first to take its place dies with the state half received, the second right after
    it is seated, the third stays."""
    faults = (
        fault(tmp_path, 1, 2, "forward"),
        fault(tmp_path, -1, 0, "receiving"),
        fault(tmp_path, -1, 0, "joined"),
    )
    run = Watched(train("joiners", workers=(1, 2)), steps=LONG, hold=str(tmp_path / "go"), faults=faults)
    run.until(lambda news: all(Path(item.marker).exists() for item in faults), "all have died")
    run.until(lambda news: any(item["kind"] == "joined" for item in news["recoveries"]), "the third joins")
    result = run.result()
    assert result.digest == undisturbed.digest
    assert "joined" in kinds(result) and result.recoveries[-1]["ranks"] == 2


def computing_while_giving(run: resilient.Run) -> None:
    """A rank that gives its state to joiners does so only once it has computed a micro-batch of that very step."""
    give = GenerationThread._send_state

    def late(self: GenerationThread, *args: Any) -> None:
        until(lambda: self.plan.kind != "planned" or self._member._seat.folded, "the step is under way", 60)
        give(self, *args)

    GenerationThread._send_state = late  # type: ignore[method-assign]


def test_two_spares_join_at_once_while_the_step_goes_on(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    train_with_spares = train("two-spares", workers=(1, 3), spares=2)
    hold = str(tmp_path / "go")
    run = Watched(train_with_spares, steps=LONG, hold=hold, before=computing_while_giving)
    run.at_step(2, ranks=3)
    until(lambda: run.ready_outside() == 2, "both spares are ready")
    for pid in [run.pid_of_rank(rank) for rank in (1, 2)]:
        psutil.Process(pid).kill()
    run.until(lambda news: any(item["ranks"] == 3 for item in news["recoveries"]), "they have joined")
    result = run.result()
    assert result.digest == undisturbed.digest
    promoted = next(item for item in result.recoveries if item["ranks"] == 3)
    assert "2 joined" in promoted["reason"], result.recoveries


@pytest.mark.long
def test_a_holder_dies_while_it_welcomes_a_joiner_and_a_spare_takes_over(
    cluster: Any, undisturbed: Any, tmp_path: Path
) -> None:
    """Three ranks and a spare: a rank dies, the spare is to join at once, and a holder dies sending it the
    state. The proposal is cancelled, and made again."""
    faults = (fault(tmp_path, 2, 4, "forward"), fault(tmp_path, 0, 4, "welcoming"))
    run = Watched(train("welcome", workers=(1, 3), spares=1), steps=LONG, hold=str(tmp_path / "go"), faults=faults)
    run.until(lambda news: any(item["kind"] == "joined" for item in news["recoveries"]), "a spare joins")
    result = run.result()
    assert result.digest == undisturbed.digest
    assert all(Path(item.marker).exists() for item in faults), run.news["messages"]


def test_a_host_dies_without_a_word_and_a_new_one_joins(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    train_on_spot = train("hosts", workers=(1, 3), resources={"CPU": 1, "spot": 1})
    with only_spots(cluster, 2, 1) as (host, _):
        run = Watched(train_on_spot, steps=LONG, hold=str(tmp_path / "go"))
        run.at_step(5, ranks=3)
        kill_host(host)
        run.until_recovered(1)
        add_spots(cluster, 2)
        run.until(lambda news: any(item["kind"] == "joined" for item in news["recoveries"]), "a rank joins")
        result = run.result()
    assert result.digest == undisturbed.digest
    lost = disturbances(result.recoveries)[0]
    assert kinds(result)[0] == "node lost" and "joined" in kinds(result), (result.recoveries, run.news["messages"])
    assert len(lost["lost"]) == 2 and lost["decide_s"] + lost["form_s"] < 5


@pytest.mark.long
def test_a_keeper_that_dies_alone_is_replaced_and_its_ranks_go_on(
    cluster: Any, undisturbed: Any, tmp_path: Path
) -> None:
    run = Watched(train("keeperless", workers=(1, 3)), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(3, ranks=3)
    pids = [run.pid_of_rank(rank) for rank in range(3)]
    _, node = run.ranks()[1]
    former = run.kill_keeper(node)
    run.until_said("another takes its place")
    until(lambda: run.keeper_names(node) not in ([], [former]), "it has been started")
    assert [run.pid_of_rank(rank) for rank in range(3)] == pids, "no rank has died with it"
    run.signal_rank(1)
    run.until_recovered(1)
    result = run.result()
    assert result.digest == undisturbed.digest
    first = disturbances(result.recoveries)[0]
    assert first["kind"] == "rank lost" and "process has ended" in first["lost"][0]["why"]


def test_a_rank_that_ends_before_any_keeper_watches_it_is_known_to_have_ended(cluster: Any, tmp_path: Path) -> None:
    """The keeper that it was to be watched by has died since it was ordered."""
    keeper = ray.remote(num_cpus=0)(Watching).remote()
    ray.kill(keeper)
    (node, *_) = sorted(launch.capacities({"CPU": 1}))
    spec = RankSpec(key="unborn/1", member=1, node=node, folder=str(tmp_path), secret="", lease_s=10.0)
    ended = threading.Event()
    rank = launch.start_rank(spec, resources={"CPU": 1}, controller=None, keeper=keeper, make_body=print)
    launch.if_it_never_begins(rank, ended.set)
    assert ended.wait(60)


def test_a_stopped_rank_is_found_and_killed(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    run = Watched(train("stopped", workers=(1, 3), detection_s=1.0), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=3)
    pid = run.signal_rank(1, signal.SIGSTOP)
    run.until_recovered(1)
    result = run.result()
    assert result.digest == undisturbed.digest
    first = disturbances(result.recoveries)[0]
    (lost,) = first["lost"]
    assert "stopped" in lost["why"] and first["detect_s"] >= 1.0
    until(lambda: not psutil.pid_exists(pid), "the stopped process has been killed", 5)


def test_below_min_it_waits_for_nodes_and_gives_up_in_time(cluster: Any) -> None:
    run = Watched(train("waiting", workers=2, resources={"CPU": 1, "absent": 1}, wait_for_nodes_s=3.0), steps=5)
    with pytest.raises(resilient.RunLost, match=r"0 of at least 2 workers.*add nodes"):
        run.result(60)
    assert any("waiting for nodes" in text for text in run.news["messages"])


@pytest.mark.long
def test_below_min_it_stands_still_until_a_rank_is_back(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    run = Watched(train("min", workers=2), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=2)
    run.signal_rank(0)
    run.until_said("1 of at least 2")
    assert run.result().digest == undisturbed.digest


def test_all_ranks_lost_is_said_and_never_a_silent_restart(cluster: Any, tmp_path: Path) -> None:
    run = Watched(train("lost", workers=2), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=2)
    pids = [run.pid_of_rank(rank) for rank in (0, 1)]
    for pid in pids:
        psutil.Process(pid).send_signal(signal.SIGSTOP)
    for pid in pids:
        psutil.Process(pid).send_signal(signal.SIGKILL)
    with pytest.raises(resilient.RunLost, match="no rank of generation 1 is left"):
        run.result(60)


class AnotherJob:
    """It uses CPUs of nodes that it shares with the run."""

    @staticmethod
    def takes(node: str, cpus: int) -> Any:
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        taken = ray.remote(Watching).options(num_cpus=cpus, scheduling_strategy=place).remote()
        ray.get(taken.watch.remote(0, 0))
        return taken


def test_ranks_go_where_other_jobs_leave_room_and_come_as_they_free_it(
    cluster: Any, undisturbed: Any, tmp_path: Path
) -> None:
    nodes = sorted(launch.capacities({"CPU": 1}).items())
    until(lambda: launch.free_now({"CPU": 1}) == dict(nodes), "nobody else uses the cluster", 30)
    taken = [AnotherJob.takes(node, room) for node, room in nodes[:-1]]
    taken.append(AnotherJob.takes(nodes[-1][0], 1))
    run = Watched(train("shared-cluster", workers=(1, 3)), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(2, ranks=1)
    assert [launch.find(f"{run.name}/1/rank/{member}") is not None for member in (1, 2)] == [True, False]
    for job in taken[:1]:
        ray.kill(job)
    run.until(lambda news: news["ranks"] == 3, "the other job has ended on a node of two places")
    assert run.result().digest == undisturbed.digest
    for job in taken[1:]:
        ray.kill(job)
