"""When no live rank holds the state any more: the run goes on from memory, and the bits stay the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import resilient
from actors import launch
from tests.integration.loops import fault, train
from tests.integration.nodes import kill_host, only_spots
from tests.integration.processes import Watched, until

STEPS = 120
EVERY_STEP = resilient.Snapshot(every=1, linger_s=60.0)


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    return train("alone").local(steps=STEPS)


@pytest.fixture
def spots(cluster: Any) -> Iterator[list[Any]]:
    """Three more nodes, each with room for one rank of a run that asks for `spot`."""
    with only_spots(cluster, 1, 1, 1) as nodes:
        yield nodes


def on_spots(name: str, **settings: Any) -> Any:
    """Three ranks, one on each of these nodes."""
    return train(name, resources={"CPU": 1, "spot": 1}, snapshot=EVERY_STEP, **settings)


def losses(result: Any) -> list[float]:
    return [row["loss"] for row in result.metrics]


def gone_back(result: Any) -> list[dict[str, Any]]:
    return [item for item in result.recoveries if item["restored_step"] >= 0]


def test_all_ranks_killed_at_once(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    run = Watched(train("all-ranks", workers=(1, 3), snapshot=EVERY_STEP), steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(5, ranks=3)
    run.until_protected(5)
    run.kill_all_ranks()
    run.until_recovered(1)
    result = run.result()
    assert result.digest == undisturbed.digest
    assert losses(result) == losses(undisturbed)
    (back,) = gone_back(result)
    assert back["source"] == "memory" and back["restored_step"] >= 5 and back["replayed"] <= 2, back


@pytest.mark.long
def test_a_keeper_dies_and_then_all_ranks(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """The next keeper takes over the slots; what the first had held is still there."""
    run = Watched(train("adopted", workers=(1, 3), snapshot=EVERY_STEP), steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=3)
    run.until_protected(3)
    for node in sorted({node for _, node in run.ranks()}):
        run.kill_keeper(node)
    run.kill_all_ranks()
    result = run.result()
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed)
    assert [item["source"] for item in gone_back(result)] == ["memory"]


def test_a_node_is_gone_together_with_all_ranks(
    cluster: Any, spots: list[Any], undisturbed: Any, tmp_path: Path
) -> None:
    run = Watched(on_spots("parity", workers=(2, 3)), steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(5, ranks=3)
    run.until_protected(run.news["step"] + 1)  # by all three: some may have joined just now
    pids = tuple(run.pid_of_rank(rank) for rank in range(3))
    kill_host(spots[1], also=pids)
    result = run.result()
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed), run.news["messages"]
    (back,) = gone_back(result)
    assert back["source"] == "parity" and back["kind"] == "node lost", (back, run.news["messages"])


@pytest.mark.long
def test_more_nodes_gone_than_parity_covers_is_said(cluster: Any, spots: list[Any], tmp_path: Path) -> None:
    run = Watched(on_spots("too-many", workers=(1, 3)), steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(5, ranks=3)
    run.until_protected(run.news["step"] + 1)  # by all three: some may have joined just now
    pids = tuple(run.pid_of_rank(rank) for rank in range(3))
    kill_host(spots[0], spots[2], also=pids)
    with pytest.raises(
        resilient.RunLost, match=r"no snapshot in memory can be read.*1 good blocks are left and 2 are needed"
    ):
        run.result(120)


@pytest.mark.long
def test_rotten_bytes_are_found_and_decoded(cluster: Any, spots: list[Any], undisturbed: Any, tmp_path: Path) -> None:
    """A byte of every slot of one node is flipped; then all ranks die."""
    run = Watched(on_spots("rotten", workers=(2, 3)), steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(5, ranks=3)
    run.until_protected(5)
    _, node = run.ranks()[0]
    pids = tuple(run.pid_of_rank(rank) for rank in range(3))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for slot in Path(launch.folder_of("rotten/1", node)).glob("rank-*.slot-*"):
        with slot.open("r+b") as file:
            file.seek(slot.stat().st_size // 3)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 16]))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    result = run.result()
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed)
    assert gone_back(result)


def test_a_rollback_and_then_the_loss_of_all_ranks(cluster: Any, tmp_path: Path) -> None:
    """The data of a step that was not finite stays left out: nothing goes back to the branch that had it."""
    bad = {"steps": STEPS, "poisoned": 9}
    settings: dict[str, Any] = {"snapshot": EVERY_STEP, "on_nonfinite": "rollback"}
    alone = train("alone", **settings).local(**bad)
    run = Watched(train("poisoned", workers=(1, 2), **settings), hold=str(tmp_path / "go"), **bad)
    run.until(lambda news: any(item["kind"] == "rolled back" for item in news["recoveries"]), "it rolls back")
    run.kill_all_ranks()
    run.until_recovered(2)
    result = run.result()
    assert result.digest == alone.digest and losses(result) == losses(alone)
    assert [item["kind"] for item in gone_back(result)][:2] == ["rolled back", "rank lost"]


DRIVER = """
    import sys, ray
    ray.init(address=sys.argv[1], log_to_driver=False)
    from tests.integration.test_snapshots import EVERY_STEP, STEPS
    from tests.integration.loops import train
    train(sys.argv[2], workers=2, detection_s=1.0, snapshot=EVERY_STEP)(steps=STEPS, hold="/nonexistent/never")
"""


@pytest.mark.parametrize("also", ["", "controller"])
def test_a_killed_job_submitted_again_goes_on_from_memory(cluster: Any, undisturbed: Any, also: str) -> None:
    """also: what dies with the driver, as on a host that both were on."""
    from tests.integration.test_lifecycle import driver

    run = f"again-{also}" if also else "again"
    process = driver(cluster, run, DRIVER)
    (name,) = (name for name in launch.names(f"{run}/1/") if name.endswith("/controller"))

    def news() -> dict[str, Any]:
        found: dict[str, Any] = ray.get(launch.find(name).look.remote(), timeout=30)
        return found

    until(lambda: news()["snapshots"].get("protected", -1) >= 4, "some steps are protected")
    with pytest.raises(resilient.ResilientError, match=f"'{run}' is going on"):
        train(run, workers=2)(steps=1)
    controller = ray.get(launch.find(name).process.remote(), timeout=30)
    process.kill()
    if also:
        os.kill(controller, signal.SIGKILL)
    process.communicate(timeout=10)
    until(lambda: launch.find(name) is None, "the first attempt's controller has ended", 60)
    result = train(run, workers=2, detection_s=1.0, snapshot=EVERY_STEP)(steps=STEPS)
    assert result.digest == undisturbed.digest
    assert result.metrics[0]["step"] >= 4 and losses(result) == losses(undisturbed)[-len(result.metrics) :]
    assert gone_back(result)[0]["kind"] == "resumed"
    until(lambda: not list(Path(launch.FOLDER).glob(f"{run}-*")), "nothing is left", 30)


@pytest.mark.parametrize(("workers", "blamed"), [(3, 1), pytest.param(2, 0, marks=pytest.mark.long)])
def test_a_bit_that_flips_in_a_rank_is_found_and_undone(
    cluster: Any, undisturbed: Any, tmp_path: Path, workers: int, blamed: int
) -> None:
    """Of three ranks the odd one is replaced; of two nobody knows which to believe, and both go back."""
    name = f"flipped-{workers}"
    faults = (fault(tmp_path, 1, 60, "flip"),)
    result = train(name, workers=(1, workers), snapshot=EVERY_STEP)(steps=STEPS, faults=faults)
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed)
    (record,) = gone_back(result)
    assert 50 < record["restored_step"] <= 60, record
    assert [lost["rank"] for lost in record["lost"]] == [1] * blamed
    assert result.snapshots["verified"] >= 50


def test_a_bit_that_flips_in_the_last_step_is_found_and_undone(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Nobody compares any more what that step makes, but the end of the run."""
    faults = (fault(tmp_path, 1, STEPS - 1, "flip once updated"),)
    result = train("flipped-last", workers=(1, 3), snapshot=EVERY_STEP)(steps=STEPS, faults=faults)
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed)
    (record,) = gone_back(result)
    assert "ended with different states" in record["reason"], record
