"""A rank that is much slower than the others for long leaves, and another one is started on another node."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import resilient
from tests.integration.loops import train
from tests.integration.nodes import only_spots
from tests.integration.processes import Watched

STEPS = 100
SLOW_S = 0.15


class Slow:
    """Each micro-batch takes long on the node that the file names, if it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, run: resilient.Run) -> None:
        if self.path.exists() and self.path.read_text() == run._team._host.node:  # type: ignore[attr-defined]
            threading.Event().wait(SLOW_S)


@pytest.mark.long
def test_a_straggler_leaves_for_one_on_another_node(cluster: object, tmp_path: Path) -> None:
    alone = train("alone").local(steps=STEPS)
    main = train("straggler", workers=2, resources={"CPU": 1, "spot": 1}, evict_stragglers=True)
    with only_spots(cluster, 1, 1, 1):
        run = Watched(main, steps=STEPS, hold=str(tmp_path / "go"), in_step=Slow(tmp_path / "slow"))
        run.at_step(3, ranks=2)
        node = run.ranks()[1][1]
        (tmp_path / "writing").write_text(node)
        (tmp_path / "writing").rename(tmp_path / "slow")
        run.until_said("times as long for a micro-batch as the median rank; it leaves")
        run.until(lambda news: any(item["kind"] == "drained" for item in news["recoveries"]), "it has left")
        assert node not in [where for _, where in run.ranks()]
        result = run.result()
    assert result.digest == alone.digest
    assert [row["loss"] for row in result.metrics] == [row["loss"] for row in alone.metrics]
    assert all(item["replayed"] == 0 and not item["lost"] for item in result.recoveries), "nothing was aborted"
