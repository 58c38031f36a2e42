"""A bit changes by itself in a rank of a pipeline, on real processes: found, gone back from, and the bits are right."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import resilient
from resilient.core.plan import Plan
from resilient.core.seat import SeatReport
from snapshot.absent import is_absent
from tests import crew
from tests.integration.test_pipelines import alone
from tests.pipelines import train

STEPS = 12


def victim(plan: Plan) -> int:
    return max(plan.stages, key=lambda stage: len(stage.ranks)).ranks[1]


class Flip:
    """Of one bit of a parameter, once, in the second rank of the widest stage."""

    def __init__(self, folder: Path) -> None:
        self.done = folder / "flipped"

    def __call__(self, run: resilient.Run) -> None:
        """At the end of each step, before the state is captured or given to others."""
        team: Any = run._team
        if self.done.exists() or run.rank != victim(team._seat.plan) or not self.is_time(team):
            return
        self.done.touch()
        pipe = team._loop.objects()["user:model"]
        parameter = next(each for each in pipe.parameters() if not is_absent(each))
        parameter.data.view(torch.int32).view(-1)[0] ^= 1

    def is_time(self, team: Any) -> bool:
        raise NotImplementedError


class InAStep(Flip):
    """When nothing else happens: digests that go with the next snapshot differ."""

    def is_time(self, team: Any) -> bool:
        return bool(team.step == 5)


class AsLayersMove(Flip):
    """Between the last exchange of a generation and the next one's move."""

    def __call__(self, run: resilient.Run) -> None:
        super().__call__(run)
        team: Any = run._team
        while team.step == 4 and team._seat.plan.kind == "initial" and team._seat.proposal is None:
            threading.Event().wait(0.01)  # until somebody joins

    def is_time(self, team: Any) -> bool:
        return bool(team._seat.plan.kind == "planned" and team._seat.forming)


def trained(flip: Flip, stages: int, *, workers: tuple[int, int], room: int, folder: Path) -> crew.Crew:
    """One more rank may join when the others have begun."""

    def change(report: SeatReport, hand: crew.Hand) -> None:
        if report.formed:
            hand.room(workers[1])

    return crew.run(
        *(train, stages, STEPS, None, False, "1f1b", flip),
        workers=workers,
        room=room,
        on_report=change,
        folder=folder / "memory",
    )


def check(found: crew.Crew) -> None:
    assert found.end is not None and found.end.outcome == "finished", found.end
    assert found.end.digest == alone(steps=STEPS).digest


@pytest.mark.parametrize(("stages", "ranks"), [(1, 3), pytest.param(2, 5, marks=pytest.mark.long)])
def test_whose_state_is_not_that_of_its_stage_is_replaced(stages: int, ranks: int, tmp_path: Path) -> None:
    """Also where it says so itself first, and has been ended before the others know."""
    found = trained(InAStep(tmp_path), stages, workers=(2, ranks), room=ranks, folder=tmp_path)
    check(found)
    first, second, *_ = found.plans
    named, suspect = victim(first), first.members[victim(first)]
    assert (first.kind, second.kind) == ("initial", "restored") and second.restore is not None
    said = rf"rank {named} \(node node\) had another state at the start of step \d+ than the majority"
    assert re.search(said, second.reason), second.reason
    assert suspect not in second.members and second.branch == 1 and second.restore.key.step <= 5


@pytest.mark.long
def test_of_two_in_a_stage_neither_is_blamed(tmp_path: Path) -> None:
    found = trained(InAStep(tmp_path), 1, workers=(2, 2), room=2, folder=tmp_path)
    check(found)
    first, second, *_ = found.plans
    assert second.kind == "restored" and set(second.members) == set(first.members)
    assert re.search(r"states at the start of step \d+ differ, and none is that of a majority", second.reason)


def test_whose_layers_are_not_the_others_as_they_are_to_move_is_replaced(tmp_path: Path) -> None:
    """Nothing of it reaches the joiner; who stands against two is named."""
    found = trained(AsLayersMove(tmp_path), 1, workers=(2, 4), room=3, folder=tmp_path)
    check(found)
    first, second, third, *_ = found.plans
    assert [plan.kind for plan in (first, second, third)] == ["initial", "planned", "restored"]
    assert "rank 1 (node node) had other bytes of layer 0" in third.reason
    assert second.members[1] not in third.members and third.branch == 1


@pytest.mark.long
def test_two_holders_that_differ_as_layers_move_both_go_back(tmp_path: Path) -> None:
    found = trained(AsLayersMove(tmp_path), 1, workers=(2, 3), room=2, folder=tmp_path)
    check(found)
    first, second, third, *_ = found.plans
    assert [plan.kind for plan in (first, second, third)] == ["initial", "planned", "restored"]
    assert "ranks 0, 1 had different bytes of layer 0" in third.reason
    assert set(second.members) == set(third.members), "nobody knows who was right"
