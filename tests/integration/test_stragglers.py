"""A rank that is slower than the others: micro-batches are dealt in proportion, and the bits stay the same."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.integration.loops import Noisy, claim, train
from tests.integration.processes import Watched

STEPS = 150


class SlowForOne(Noisy):
    """The rank that reads first takes long for every sample."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self._marker = marker
        self._slow: bool | None = None

    def __getitem__(self, index: int) -> Any:
        if self._slow is None:
            self._slow = claim(self._marker)
        if self._slow:
            threading.Event().wait(0.05)
        return super().__getitem__(index)


@pytest.mark.long
def test_micro_batches_are_dealt_in_proportion_and_the_straggler_is_said(cluster: Any, tmp_path: Path) -> None:
    undisturbed = train("alone").local(steps=STEPS)
    main = train("uneven", workers=2, detection_s=1.0)
    run = Watched(main, steps=STEPS, hold=str(tmp_path / "go"), dataset=SlowForOne(str(tmp_path / "slow")))
    run.until(lambda news: news["recoveries"], "dealt anew")
    (change,) = run.news["recoveries"]
    assert change["kind"] == "dealt anew" and "in proportion to the ranks' speed" in change["reason"]
    run.until_said("is a straggler")
    speeds = sorted(seat["speed"] for seat in ray.get(run.controller.look.remote(), timeout=30)["ranks"])
    assert speeds[0] < 1 / 3 and speeds[1] == 1.0
    result = run.result()
    assert result.digest == undisturbed.digest
    assert [row["loss"] for row in result.metrics] == [row["loss"] for row in undisturbed.metrics]
