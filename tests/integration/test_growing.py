"""Buffers that are set between steps, over real processes: a rank that joins later has them too."""

from __future__ import annotations

from pathlib import Path

import resilient
from resilient.core.seat import SeatReport
from tests import crew
from tests.growing import train

STEPS = 150


def test_a_replacement_has_buffers_that_were_set_before_it(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(report: SeatReport, hand: crew.Hand) -> None:
        plan = hand.plan
        if plan is not None and not killed and report.step >= 5:
            killed.append(plan.members[-1])
            hand.kill(killed[0])
        if plan is not None and killed and plan.size == 3 and killed[0] not in plan.members:
            (tmp_path / "go").touch()

    found = crew.run(train, STEPS, str(tmp_path / "go"), workers=(2, 3), on_report=kill)
    assert found.end is not None and found.end.outcome == "finished", found.end
    assert killed and {plan.kind for plan in found.plans} == {"initial", "unplanned", "planned"}
    assert found.end.digest == resilient.train(name="alone")(train).local(STEPS).digest
