"""Checkpoints of a run in one process: what it leaves is gone on from, to the same bits, and by others too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import resilient
from resilient.local_saving import LocalSaving
from snapshot import store
from snapshot.disk import Disk
from snapshot.files import open_files
from tests.integration.loops import train
from tests.shards import flip

STEPS = 24


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    return train("alone").local(steps=STEPS)


def losses(result: Any) -> list[float]:
    return [row["loss"] for row in result.metrics]


def test_a_run_that_stopped_goes_on_from_its_last_checkpoint(undisturbed: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "checkpoint": resilient.Checkpoint(str(tmp_path), every=5, keep=2),
        "on_nonfinite": "stop",
    }
    with pytest.raises(resilient.ResilientError, match="not finite"):
        train("again", **settings).local(steps=STEPS, poisoned=13)
    result = train("again", **settings).local(steps=STEPS)
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed)[13:]
    complete = [found.key for found in store.checkpoints(open_files(str(tmp_path))) if found.complete]
    assert [(key.attempt, key.step) for key in complete] == [(2, 20), (2, STEPS)]
    again = train("again", **settings).local(steps=STEPS)
    assert again.digest == undisturbed.digest and again.metrics == []


def test_a_step_or_the_beginning_can_be_asked_for(undisturbed: Any, tmp_path: Path) -> None:
    def run(resume: Any) -> Any:
        checkpoint = resilient.Checkpoint(str(tmp_path), every=8, keep=9, resume=resume)
        return train("asked", checkpoint=checkpoint).local(steps=STEPS)

    assert len(losses(run("never"))) == STEPS
    result = run(16)
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed)[16:]
    assert len(losses(run("never"))) == STEPS
    with pytest.raises(resilient.RunLost, match=r"resume=17: there is no complete checkpoint of step 17"):
        run(17)


def test_data_that_was_left_out_stays_out(tmp_path: Path) -> None:
    bad: dict[str, Any] = {"steps": STEPS, "poisoned": 4}
    whole = train("whole", on_nonfinite="skip").local(**bad)
    checkpoint = resilient.Checkpoint(str(tmp_path), every=10)
    saving = train("whole", on_nonfinite="skip", checkpoint=checkpoint)
    assert saving.local(**bad).digest == whole.digest
    from_10 = train("whole", on_nonfinite="skip", checkpoint=resilient.Checkpoint(str(tmp_path), every=10, resume=10))
    assert from_10.local(**bad).digest == whole.digest


def test_memory_is_for_this_process_only(undisturbed: Any) -> None:
    checkpoint = resilient.Checkpoint("memory://local-saving", every=10)
    result = train("here", checkpoint=checkpoint).local(steps=STEPS)
    assert result.digest == undisturbed.digest
    assert store.newest(open_files("memory://local-saving", allow_memory=True)) is not None
    with pytest.raises(ValueError, match="memory://"):
        open_files("memory://local-saving")


def steps_at(url: Path, run: str) -> list[int]:
    return [found.key.step for found in store.checkpoints(open_files(str(url)), run) if found.complete]


def test_another_runs_checkpoints_are_refused_before_training(undisturbed: Any, tmp_path: Path) -> None:
    url = tmp_path / "url"
    train("former", checkpoint=resilient.Checkpoint(str(url), every=8)).local(steps=STEPS)
    before = sorted(url.iterdir())
    with pytest.raises(
        ValueError, match=rf"url='{url}'.*'former'.*step 24.*'later'.*resume_from='{url}'.*name='former'"
    ):
        train("later", checkpoint=resilient.Checkpoint(str(url), every=8)).local(steps=STEPS)
    assert sorted(url.iterdir()) == before
    own = resilient.Checkpoint(str(tmp_path / "own"), every=8, resume=16, resume_from=str(url))
    result = train("later", checkpoint=own).local(steps=STEPS)
    assert result.digest == undisturbed.digest and losses(result) == losses(undisturbed)[16:]
    assert sorted(url.iterdir()) == before and steps_at(tmp_path / "own", "later") == [STEPS]
    again = replace(own, resume="auto")
    assert train("later", checkpoint=again).local(steps=STEPS).metrics == []  # its own counts first


def test_two_that_begin_at_one_url_leave_each_other_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = resilient.Checkpoint(str(tmp_path), every=1, keep=2)
    slow, fast = LocalSaving(checkpoint, "slow"), LocalSaving(checkpoint, "fast")
    objects = {"m": torch.nn.Linear(2, 1)}
    for saving, first in ((fast, 100), (slow, 1)):
        for step in range(first, first + 3):
            saving.boundary(step, None, objects)
    assert steps_at(tmp_path, "fast") == [101, 102] and steps_at(tmp_path, "slow") == [2, 3]
    assert capsys.readouterr().err.count("the run 'fast' keeps checkpoints at") == 1
    assert LocalSaving(checkpoint, "slow").resume(objects)[0] == 3


def test_what_storage_gives_back_changed_is_no_checkpoint_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("resilient.local_saving.pause_s", lambda tries, run: 0.0)
    local, objects = (
        LocalSaving(resilient.Checkpoint(str(tmp_path), every=1, keep=1), "run"),
        {"m": torch.nn.Linear(2, 1)},
    )
    local.boundary(1, None, objects)
    rename = Disk.rename

    def flips(disk: Disk, source: Path, target: Path) -> None:
        if target.suffix == ".bin":
            flip(source, 5, 3)
        rename(disk, source, target)

    monkeypatch.setattr(Disk, "rename", flips)
    local.boundary(2, None, objects)
    why = "read back right after it was written, chunk 0"
    assert why in capsys.readouterr().err and steps_at(tmp_path, "run") == [1]
    with pytest.raises(store.NotAsWritten, match=why):
        local.save_newest()
    monkeypatch.undo()
    local.boundary(3, None, objects)
    assert steps_at(tmp_path, "run") == [3] and capsys.readouterr().err == ""


def test_where_to_begin_from_is_another_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume_from=.*is the url itself"):
        resilient.Checkpoint(str(tmp_path), resume_from=f"{tmp_path}/")
    with pytest.raises(ValueError, match='resume="never", resume_from'):
        resilient.Checkpoint(str(tmp_path), resume="never", resume_from="/other")
    with pytest.raises(ValueError, match=r"resume_from=7"):
        resilient.Checkpoint(str(tmp_path), resume_from=7)  # type: ignore[arg-type]
