"""Connections between stages that break in the middle of a step, on real processes: nothing is lost."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from resilient.core.seat import SeatReport
from tests import crew
from tests.integration.test_pipelines import STEPS, alone, check
from tests.pipelines import Death, train


class Torn(Death):
    """Who comes by with its second micro-batch waits there until the links are cut."""

    def __init__(self, phase: str, step: int, folder: Path) -> None:
        super().__init__(phase, 0, step, folder / "there")
        self.cut = folder / "cut"

    def at(self, phase: str, run: Any) -> None:
        if (phase, run.step) != (self.phase, self.step):
            return
        self.mark.touch()
        while not self.cut.exists():
            threading.Event().wait(0.01)


@pytest.mark.parametrize(
    ("phase", "which"),
    [
        ("forward", "post"),
        *(
            pytest.param(*torn, marks=pytest.mark.long)
            for torn in (("forward", "group"), ("backward", "post"), ("backward", "all"))
        ),
    ],
)
def test_links_between_stages_break_in_the_middle_of_a_step(phase: str, which: crew.Which, tmp_path: Path) -> None:
    """What is sent between stages is sent again over new connections, and nobody forms anew for that; whose group has
    broken forms again, and goes on with what it has."""
    torn, cut = Torn(phase, 3, tmp_path), []

    def tear(report: SeatReport, hand: crew.Hand) -> None:
        if torn.mark.exists() and not cut and hand.plan is not None:
            cut.extend(hand.cut(one, other, which) for one, other in pairwise(hand.plan.members))
            torn.cut.touch()

    found = crew.run(train, 3, STEPS, torn, workers=(3, 3), on_report=tear)
    check(found, alone())
    assert len(cut) == 2 and all(cut), "there was nothing to cut"
    assert [plan.kind for plan in found.plans].count("unplanned") == int(which != "post")
    assert all(set(plan.members) == set(found.plans[0].members) for plan in found.plans), "nobody was blamed"
