"""A stage is lost with its only rank: all go back to memory, and other layers go to other ranks."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import resilient
from tests.integration.nodes import kill_host, only_spots
from tests.integration.processes import Watched, disturbances
from tests.pipelines import train

pytestmark = pytest.mark.long

STEPS = 60
EVERY_STEP = resilient.Snapshot(every=1, linger_s=60.0)


def slowly(run: resilient.Run, hold: str) -> None:
    """Until the file is there."""
    if not os.path.exists(hold):
        threading.Event().wait(0.8)


def pipeline(name: str, **settings: Any) -> Any:
    def main(run: resilient.Run, stages: int, steps: int, hold: str = "", shard: bool = False) -> list[float]:
        beside = functools.partial(slowly, hold=hold) if hold else lambda run: None
        return train(run, stages, steps, beside=beside, shard_optimizer=shard)

    return resilient.train(name=name, **{"resources": {"CPU": 1}, "seed": 0, **settings})(main)


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    return pipeline("alone", workers=1).local(1, STEPS)


def losses(result: Any) -> list[float]:
    return [row["loss"] for row in result.metrics]


def test_the_only_rank_of_a_stage_is_killed(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """The others go on without it, with fewer stages; when another one has come, with as many as before."""
    run = Watched(
        pipeline("stage-lost", workers=(2, 3), snapshot=EVERY_STEP), stages=3, steps=STEPS, hold=str(tmp_path / "go")
    )
    run.at_step(6, ranks=3)
    run.until_protected(5)
    run.signal_rank(1)
    run.until_recovered(1)
    run.until(lambda news: news["ranks"] == 3, "there are three again")
    result = run.result()
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed), run.news["messages"]
    back = disturbances(result.recoveries)[0]
    assert back["source"] == "memory" and back["restored_step"] >= 5 and back["replayed"] <= 3, back
    assert any(item["kind"] == "joined" for item in result.recoveries[1:]), result.recoveries


def test_a_rank_is_killed_that_had_optimizer_state_of_its_own(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """All go back to memory, though others have its layers; chunks go to other ranks."""
    name, hold = "shard-lost", str(tmp_path / "go")
    run = Watched(pipeline(name, workers=(2, 3), snapshot=EVERY_STEP), stages=2, steps=STEPS, hold=hold, shard=True)
    run.at_step(6, ranks=3)
    run.until_protected(5)
    run.signal_rank(1)
    run.until_recovered(1)
    (tmp_path / "go").touch()
    result = run.result()
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed), run.news["messages"]
    back = disturbances(result.recoveries)[0]
    assert back["source"] == "memory" and back["restored_step"] >= 5 and back["replayed"] <= 3, back


def test_a_node_is_gone_with_the_only_rank_of_a_stage(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Its layers are decoded from what the other nodes hold of them."""
    with only_spots(cluster, 1, 1, 1) as spots:
        settings = {"resources": {"CPU": 1, "spot": 1}, "workers": (2, 3), "snapshot": EVERY_STEP}
        run = Watched(pipeline("stage-node", **settings), stages=3, steps=STEPS, hold=str(tmp_path / "go"))
        run.at_step(6, ranks=3)
        run.until_protected(run.news["step"] + 1)
        kill_host(spots[1])
        result = run.result()
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed), run.news["messages"]
    back = next(item for item in result.recoveries if item["restored_step"] >= 0)
    assert back["source"] == "parity", (back, run.news["messages"])


def test_two_nodes_are_gone_at_once_with_two_stages(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Two parity blocks cover that: both stages' layers are decoded from what two other nodes hold."""
    with only_spots(cluster, 1, 1, 1, 1) as spots:
        twice = resilient.Snapshot(every=1, linger_s=60.0, parity=2)
        settings = {"resources": {"CPU": 1, "spot": 1}, "workers": (2, 4), "snapshot": twice}
        run = Watched(pipeline("stages-node", **settings), stages=4, steps=STEPS, hold=str(tmp_path / "go"))
        run.at_step(6, ranks=4)
        run.until_protected(run.news["step"] + 1)
        kill_host(spots[1], spots[2])
        run.until_recovered(1)
        (tmp_path / "go").touch()
        result = run.result()
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed), run.news["messages"]
    back = next(item for item in result.recoveries if item["restored_step"] >= 0)
    assert back["source"] == "parity" and back["ranks"] == 2, (back, run.news["messages"])


def test_a_checkpoint_is_gone_on_from_with_another_number_of_stages(
    cluster: Any, undisturbed: Any, tmp_path: Path
) -> None:
    checkpoint = resilient.Checkpoint(str(tmp_path / "checkpoints"), every=10)
    half = pipeline("stages-stored", workers=3, snapshot=EVERY_STEP, checkpoint=checkpoint)(3, STEPS // 2)
    assert half.step == STEPS // 2
    result = pipeline("stages-stored", workers=2, snapshot=EVERY_STEP, checkpoint=checkpoint)(2, STEPS)
    assert result.digest == undisturbed.digest
