"""Durable checkpoints: what memory can't keep, storage does, and the bits stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import resilient
from snapshot import store
from snapshot.files import open_files
from snapshot.stored import Stored
from tests.integration.loops import train
from tests.integration.nodes import kill_host, only_spots
from tests.integration.processes import Watched, left_behind

STEPS = 120
EVERY_STEP = resilient.Snapshot(every=1, linger_s=0.0)


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    return train("alone").local(steps=STEPS)


def losses(result: Any) -> list[float]:
    return [row["loss"] for row in result.metrics]


def complete(url: Path) -> list[int]:
    return [found.key.step for found in store.checkpoints(open_files(str(url))) if found.complete]


@pytest.mark.long
def test_a_run_leaves_its_final_state_and_the_last_few_before(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    url = tmp_path / "checkpoints"
    checkpoint = resilient.Checkpoint(str(url), every=40, keep=2)
    result = train("saved", workers=(1, 3), snapshot=EVERY_STEP, checkpoint=checkpoint)(steps=STEPS)
    assert result.digest == undisturbed.digest
    steps = complete(url)
    assert steps[-1] == STEPS and len(steps) == 2, steps
    assert result.checkpoints["durable"] == STEPS and result.checkpoints["failures"] == 0, result.checkpoints
    files = open_files(str(url))
    assert Stored.open(files, store.checkpoints(files)[-1]).verify() == []
    assert left_behind("saved") == []


@pytest.mark.long
def test_a_run_that_failed_goes_on_from_storage_when_it_is_submitted_again(
    cluster: Any, undisturbed: Any, tmp_path: Path
) -> None:
    checkpoint = resilient.Checkpoint(str(tmp_path), every=25, compression="none")
    settings: dict[str, Any] = {"workers": 2, "snapshot": EVERY_STEP, "on_nonfinite": "stop"}
    with pytest.raises(resilient.ResilientError, match="not finite"):
        train("stored-before", **settings, checkpoint=checkpoint)(steps=STEPS, poisoned=60)
    settings["workers"] = 3
    newest = complete(tmp_path)[-1]
    assert newest in (25, 50), "what was being written when the run failed is left undone"
    result = train("stored-before", **settings, checkpoint=checkpoint)(steps=STEPS)
    assert result.digest == undisturbed.digest
    (back,) = (item for item in result.recoveries if item["restored_step"] >= 0)
    assert (back["kind"], back["source"], back["restored_step"]) == ("resumed", "storage", newest), back
    assert losses(result) == losses(undisturbed)[newest:]

    before_the_end = complete(tmp_path)[-2]  # that of step 100, unless the one before was still being written
    from_there = resilient.Checkpoint(str(tmp_path), every=25, resume=before_the_end)
    result = train("stored-before", **settings, checkpoint=from_there)(steps=STEPS)
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed)[before_the_end:]
    with pytest.raises(resilient.RunLost, match=r"resume=7: there is no complete checkpoint of step 7"):
        train("stored-before", **settings, checkpoint=resilient.Checkpoint(str(tmp_path), resume=7))(steps=STEPS)


@pytest.mark.long
def test_more_nodes_gone_than_parity_covers_and_the_run_goes_on_from_storage(
    cluster: Any, undisturbed: Any, tmp_path: Path
) -> None:
    with only_spots(cluster, 1, 1, 1) as nodes:
        on_spots = train(
            "stored",
            workers=(1, 3),
            resources={"CPU": 1, "spot": 1},
            snapshot=EVERY_STEP,
            checkpoint=resilient.Checkpoint(str(tmp_path / "checkpoints"), every=5),
        )
        run = Watched(on_spots, steps=STEPS, hold=str(tmp_path / "go"))
        run.at_step(5, ranks=3)
        run.until_protected(run.news["step"] + 1)
        run.until(lambda news: news["checkpoints"]["durable"] >= 5, "a checkpoint is durable")
        pids = tuple(run.pid_of_rank(rank) for rank in range(3))
        kill_host(nodes[0], nodes[2], also=pids)
        result = run.result()
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed), run.news["messages"]
    (back,) = (item for item in result.recoveries if item["restored_step"] >= 0)
    assert (back["source"], back["kind"]) == ("storage", "node lost"), (back, run.news["messages"])


@pytest.mark.long
def test_training_goes_on_when_storage_fails_and_it_is_told(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    url = tmp_path / "checkpoints"
    saving = train("unsaved", workers=2, snapshot=EVERY_STEP, checkpoint=resilient.Checkpoint(str(url), every=20))
    run = Watched(saving, steps=STEPS, hold=str(tmp_path / "go"))
    run.until(lambda news: news["checkpoints"].get("durable", -1) >= 20, "a checkpoint is durable")
    former = complete(url)
    url.rename(tmp_path / "moved")
    url.write_text("no folder any more")
    result = run.result()
    assert result.digest == undisturbed.digest
    assert result.checkpoints["failures"] > 0 and result.checkpoints["last_failure"], result.checkpoints
    assert set(former) <= set(complete(tmp_path / "moved"))


@pytest.mark.long
def test_a_run_begins_from_anothers_checkpoint_only_when_told_and_never_writes_there(
    cluster: Any, undisturbed: Any, tmp_path: Path
) -> None:
    former = tmp_path / "former"
    train("former", checkpoint=resilient.Checkpoint(str(former), every=40)).local(steps=STEPS)
    before = sorted(former.iterdir())
    with pytest.raises(ValueError, match="the run 'former' keeps its checkpoints there"):
        train("latter", checkpoint=resilient.Checkpoint(str(former)))(steps=STEPS)
    own = resilient.Checkpoint(str(tmp_path / "own"), every=40, resume=80, resume_from=str(former))
    result = train("latter", workers=2, snapshot=EVERY_STEP, checkpoint=own)(steps=STEPS)
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed)[80:]
    assert sorted(former.iterdir()) == before and complete(tmp_path / "own")[-1] == STEPS
