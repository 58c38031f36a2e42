"""The first minutes with a cluster: what ordinary scripts have in them works, and what can't work says why."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import resilient
from tests.integration.loops import body, train
from tests.integration.processes import left_behind


class OnlyOnRanks:
    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (os.getpid(),)


def _made(rank: int) -> int:
    if os.environ.get("DRIVER") == str(os.getpid()):
        raise OSError("no such device in the driver")
    return rank


def parsing(run: resilient.Run) -> Any:
    """As in many scripts: flags of a backend, arguments of the command line, and something of one's own to return."""
    torch.backends.cudnn.deterministic = True
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    body(run, steps=parser.parse_args().steps)
    return OnlyOnRanks()


def test_arguments_and_values(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = resilient.train(name="parsing", resources={"CPU": 1}, seed=3)(parsing)
    monkeypatch.setenv("DRIVER", str(os.getpid()))
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "4"])
    result = run()
    assert result.digest == train("alone").local(steps=4).digest and len(result.metrics) == 4
    with pytest.raises(resilient.ValueNotLoaded, match="no such device in the driver"):
        _ = result.value
    monkeypatch.setattr(sys, "argv", ["train.py", "--step-count", "4"])
    with pytest.raises(resilient.TrainingFailed) as caught:
        run()
    assert "train.py: error: the following arguments are required: --steps" in str(caught.value)


def test_a_finished_run_that_is_submitted_again_has_its_metrics(cluster: Any, tmp_path: Path) -> None:
    checkpoint = resilient.Checkpoint(str(tmp_path), every=10)
    pace = str(tmp_path / "never there")
    # No snapshot but that of the final state, for which a slot is free however slow the machine is.
    snapshot = resilient.Snapshot(every=100, linger_s=0.0)
    run = train("submitted-again", workers=(1, 2), snapshot=snapshot, checkpoint=checkpoint)
    first = run(steps=6, hold=pace)
    assert first.checkpoints["durable"] == 6
    for _ in range(2):
        again = run(steps=6, hold=pace)
        assert (again.digest, again.step, again.metrics) == (first.digest, 6, first.metrics)


def test_what_no_node_can_do_is_said_at_once(cluster: Any) -> None:
    with pytest.raises(resilient.RunLost, match=r"/proc/nowhere/resilient-.* can't be made .* on every node"):
        train("nowhere", snapshot=resilient.Snapshot(directory="/proc/nowhere"))(steps=1)
    news: list[dict[str, Any]] = []
    with pytest.raises(resilient.RunLost, match="nosuch: 1"):
        train("nosuch", resources={"nosuch": 1}, wait_for_nodes_s=3.0).watched(news.append, steps=1)
    assert any("nosuch: 1" in (each["waiting"] or {"why": ""})["why"] for each in news)
    assert not left_behind("nowhere") and not left_behind("nosuch")
