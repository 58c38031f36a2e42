"""A pipeline of two stages, rank 1 on node a and rank 2 on node b, loses one of them: as transcripts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from resilient.core.events import (
    PipelineShape,
    RankGone,
    RankLeaving,
    RankReady,
    RankReported,
    RankReturned,
    Resumed,
)
from resilient.core.instructions import End, Instruction, Say
from resilient.core.plan import Address
from resilient.core.seat import SeatReport
from snapshot.core.digest import StatePart, put_together
from tests.unit.test_restoring_core import Scenario, found, kinds, only, plan_of

SHAPE = PipelineShape(stages=2, layer_bytes=(10, 10))
PARTS = {
    member: StatePart(skeleton=b"s", state_bytes=2, ranges=((member - 1, member),), digests=(bytes([member]) * 16,))
    for member in (1, 2)
}


class Pipeline(Scenario):
    shape = SHAPE

    def ready(self, *members: int) -> tuple[Instruction, ...]:
        out: tuple[Instruction, ...] = ()
        for member in members:
            out = self.take(
                RankReady(
                    member=member,
                    node="ba"[member % 2],
                    address=Address(host="h", port=member),
                    micro_batches=4,
                    steps=9,
                    probe="p",
                    probe_fields="p",
                    pipeline=self.shape,
                )
            )
        return out

    def finished(self, member: int) -> tuple[Instruction, ...]:
        self.serial += 1
        report = SeatReport(
            member=member,
            generation=1,
            formed=1,
            broken=0,
            step=9,
            complete=8,
            finished=True,
            waiting=False,
            serial=self.serial,
        )
        return self.take(RankReported(report=report))

    def returned(self, member: int) -> tuple[Instruction, ...]:
        return self.take(RankReturned(member=member, step=9, digest="", part=PARTS[member]))


def begun(shape: PipelineShape = SHAPE) -> Pipeline:
    run = Pipeline()
    run.shape = shape
    run.begun()
    assert [stage.ranks for stage in run.control.plans[1].stages] == [(0,), (1,)]
    return run


def at_the_end() -> Pipeline:
    """Both have left the loop; nobody has returned."""
    run = begun()
    run.finished(1)
    run.finished(2)
    return run


def test_who_is_left_goes_back_on_a_branch_of_its_own() -> None:
    run = begun()
    run.ready(3)
    run.take(RankGone(member=1, why="killed"))
    plan = plan_of(run.answer(found("a", 4), found("b", 4)))
    assert plan.kind == "restored" and 2 in plan.ranks, "it has captured later states than that of step 4"
    assert [(branch.number, branch.parent, branch.at_step) for branch in plan.branches] == [(0, None, 0), (1, 0, 4)]


def test_who_is_left_waits_for_others_where_the_layers_do_not_fit() -> None:
    """As few ranks as the user allows would do, but not for their memory."""
    run = begun(replace(SHAPE, rank_bytes=15))
    run.take(RankGone(member=1, why="killed"))
    out = run.answer(found("a", 4), found("b", 4))
    (said,) = (one.text for one in out if isinstance(one, Say))
    assert "waiting for nodes" in said and "add ranks, or give them more memory" in said
    plan = plan_of(run.ready(3))
    assert plan.kind == "restored" and set(plan.members) == {2, 3} and len(plan.stages) == 2


def test_when_nobody_is_left_the_branch_goes_on() -> None:
    run = begun()
    run.take(RankGone(member=1, why="killed"))
    run.take(RankGone(member=2, why="killed"))
    run.ready(3, 4)
    plan = plan_of(run.answer(found("a", 4), found("b", 4)))
    assert plan.kind == "restored" and len(plan.branches) == 1


def end_of(out: tuple[Any, ...]) -> End:
    end = only(out, End)
    assert isinstance(end, End)
    return end


def test_the_end_is_put_together_from_all_parts() -> None:
    run = at_the_end()
    run.returned(1)
    end = end_of(run.returned(2))
    assert end.outcome == "finished" and end.digest == put_together(PARTS.values())


def test_parts_of_different_states_end_the_run() -> None:
    run = at_the_end()
    run.returned(1)
    end = end_of(run.take(RankReturned(member=2, step=9, digest="", part=replace(PARTS[2], ranges=((0, 1),)))))
    assert end.outcome == "failed" and "ranks ended with different states: several ranks have" in end.reason


def test_whoever_dies_after_it_has_told_its_part_is_not_missed() -> None:
    run = at_the_end()
    run.returned(1)
    assert "End" not in kinds(run.take(RankGone(member=1, why="its node was taken away")))
    end = end_of(run.returned(2))
    assert end.outcome == "finished" and end.digest == put_together(PARTS.values())


def test_a_stage_that_is_lost_before_it_was_told_is_gone_back_for() -> None:
    run = at_the_end()
    run.returned(2)
    out = run.take(RankGone(member=1, why="killed"))
    assert "End" not in kinds(out) and "TakeInventory" in kinds(out)


def test_ranks_of_one_stage_may_tell_the_same() -> None:
    assert put_together([PARTS[1], PARTS[2], PARTS[1]]) == put_together(PARTS.values())


def came_back() -> Pipeline:
    """A new controller, which has heard all reports, and of nobody that it is ready."""
    before, run = begun(), Pipeline()
    run.take(Resumed(plans=(before.control.plans[1],), spawned=((1, "a"), (2, "b"))))
    run.nodes()
    for member in (1, 2):
        run.report(member, 1)
    return run


def test_a_controller_that_came_back_plans_stages_as_soon_as_anybody_has_told_of_them() -> None:
    run = came_back()
    run.take(RankLeaving(member=1, why="asked to"))
    assert run.control.creating is None, "nobody has said how many layers there are"
    plan = plan_of(run.ready(3))
    assert 3 in plan.joiners and plan.stages


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(PARTS[2], skeleton=b"t"), "different structure"),
        (replace(PARTS[2], state_bytes=3), "different structure"),
        (replace(PARTS[2], ranges=((0, 1),)), "from 0 on, and differ"),
        (replace(PARTS[2], ranges=((1, 1),)), "nobody has bytes 1..1 "),
    ],
)
def test_parts_that_are_not_those_of_one_state(other: StatePart, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        put_together([PARTS[1], other])
