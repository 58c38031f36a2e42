"""Layers move while the step is computed, on real processes: what only updates need comes last, and nobody waits for it
but the update."""

from __future__ import annotations

import functools
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import resilient
from resilient.core.plan import Plan
from resilient.core.seat import SeatReport
from resilient.moving import Moving
from tests import crew
from tests.integration.test_pipelines import alone
from tests.pipelines import train

STEPS = 9
LIMIT_S = 60.0


def held_back(run: resilient.Run, folder: Path, shard: bool, rank_bytes: int | None, goes: bool) -> list[float]:
    """In this process, which is a rank's own, what only updates need comes when all of the step has been computed. If
    it `goes`, not even then but when the test says so. In step 4 all wait for a change of plan."""
    team: Any = run._team
    send_and_receive, calls = Moving._send_and_receive, [0]

    def held_back(self: Moving, *args: Any) -> None:
        planned = self._plan.kind == "planned"
        calls[0] += planned
        if planned and calls[0] % 2 == 0 and rank_bytes is None:
            until(lambda: team._seat.work and team._seat.folded == team._seat.work)
            (folder / f"{self._plan.generation}-{team.number}").touch()
            until(lambda: not goes or (folder / "go").exists())
        send_and_receive(self, *args)

    def wait_for_plan(run: resilient.Run) -> None:
        while run.step == 4 and team._seat.proposal is None and not team._seat.restoring and not team._seat.broken:
            threading.Event().wait(0.01)

    Moving._send_and_receive = held_back  # type: ignore[method-assign]
    return train(run, 2, STEPS, None, False, "1f1b", wait_for_plan, shard, rank_bytes=rank_bytes)


def until(holds: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        threading.Event().wait(0.005)


def marked(folder: Path, generation: int) -> set[int]:
    return {int(path.name.split("-")[1]) for path in folder.glob(f"{generation}-*")}


def moved(before: Plan, after: Plan) -> bool:
    return any(layers(before, member) != layers(after, member) for member in after.members)


def layers(plan: Plan, member: int) -> range:
    stage = plan.stage_of(plan.rank_of(member)) if member in plan.ranks else None
    return range(0) if stage is None else range(stage.first, stage.stop)


def check(found: crew.Crew) -> None:
    assert found.end is not None and found.end.outcome == "finished", found.end.reason if found.end else found
    reference = alone(steps=STEPS)
    assert found.end.digest == reference.digest
    if not any(plan.kind == "restored" for plan in found.plans):  # then steps are given up, or done again
        for told in found.values.values():
            losses = [loss for loss in told if not math.isnan(loss)]  # whoever joins may have begun once before
            assert losses == reference.value[-len(losses) :], "whoever joins has seen the last ones"


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_whole_step_is_computed_before_what_only_updates_need_is_there(tmp_path: Path, shard: bool) -> None:
    def change(report: SeatReport, hand: crew.Hand) -> None:
        if report.step == 4:
            hand.room(3)

    job = functools.partial(held_back, folder=tmp_path, shard=shard, rank_bytes=None, goes=False)
    found = crew.run(job, workers=(1, 3), room=2, on_report=change)
    check(found)
    first, second = found.plans[:2]
    assert (first.kind, second.kind) == ("initial", "planned") and moved(first, second)
    assert marked(tmp_path, second.generation) == set(second.members), "the joiner too"


def test_where_there_is_no_room_for_both_all_wait(tmp_path: Path) -> None:
    def change(report: SeatReport, hand: crew.Hand) -> None:
        if report.step == 4:
            hand.room(3)

    job = functools.partial(held_back, folder=tmp_path, shard=False, rank_bytes=1200, goes=False)
    found = crew.run(job, workers=(1, 3), room=2, on_report=change)
    check(found)
    assert not marked(tmp_path, found.plans[1].generation)


@pytest.mark.parametrize(
    ("victim", "shard"),
    [
        ("joiner", False),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("member", False), ("joiner", True), ("member", True))
        ),
    ],
)
def test_what_was_computed_by_a_change_that_fails_is_dropped(tmp_path: Path, victim: str, shard: bool) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    killed: list[int] = []

    def change(report: SeatReport, hand: crew.Hand) -> None:
        if report.step == 4 and not killed:
            hand.room(4)
        before = hand.plan
        if before is None or killed or before.size != 3:
            return
        ahead = marked(tmp_path, before.generation + 1)
        if len(ahead) == 4:
            (joiner,) = ahead - set(before.members)
            killed.append(joiner if victim == "joiner" else twin(before))
            hand.room(3)
            hand.kill(killed[0])
            (tmp_path / "go").touch()

    job = functools.partial(held_back, folder=tmp_path, shard=shard, rank_bytes=None, goes=True)
    found = crew.run(job, workers=(1, 4), room=3, on_report=change, folder=memory)
    check(found)
    assert killed
    kinds = [plan.kind for plan in found.plans[:3]]
    lost = shard and victim == "member"  # its share of the optimizer's state
    assert kinds == ["initial", "planned", "restored" if lost else "unplanned"], found.said
    assert found.plans[2].base == found.plans[0].generation or lost


def twin(plan: Plan) -> int:
    """A member whose layers another one has too."""
    stage = next(stage for stage in plan.stages if len(stage.ranks) > 1)
    return plan.members[stage.ranks[-1]]
