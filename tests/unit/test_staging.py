"""A pipeline's stages for the ranks that there are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from resilient.core.events import PipelineShape
from resilient.core.partition import DoesNotFit
from resilient.core.plan import Address, Place, Plan, Stage
from resilient.core.planner import unplanned
from resilient.core.speeds import Speeds
from resilient.core.staging import Staging, Timings, costs_and_speeds, gain, held_by, staged

EVEN = PipelineShape(stages=2, layer_bytes=(100,) * 4)


def layers(found: Staging) -> list[tuple[int, int]]:
    return [(stage.first, stage.stop) for stage in found.stages]


def plan_of(found: Staging, generation: int = 1) -> Plan:
    address = Address(host="h", port=1)
    return Plan(
        generation=generation,
        base=0,
        kind="initial",
        places=tuple(Place(member=member, node="n", address=address) for member in found.seated),
        leaves=found.leaves,
        micro_batches=8,
        joiners=(),
        reason="test",
        stages=found.stages,
    )


def stages_for(*members: int, shape: PipelineShape = EVEN, **more: object) -> Staging:
    given: dict[str, object] = {"micro_batches": 8, "held": {}, "measured": {}, **more}
    return staged(shape, members, **given)  # type: ignore[arg-type]


def test_before_anything_is_measured_a_layer_costs_what_it_weighs() -> None:
    found = stages_for(1, 2, shape=PipelineShape(stages=2, layer_bytes=(300, 100, 100, 100)))
    assert layers(found) == [(0, 1), (1, 4)]
    assert layers(stages_for(1, 2, shape=PipelineShape(stages=2, layer_bytes=(0, 0, 0, 0)))) == [(0, 2), (2, 4)]


def test_then_what_it_was_measured_to_take() -> None:
    measured = {(1, 0): 0.1, (1, 1): 0.1, (2, 2): 0.1, (2, 3): 0.3}
    assert layers(stages_for(1, 2, measured=measured)) == [(0, 3), (3, 4)]


def test_fewer_ranks_than_stages_make_fewer_stages() -> None:
    found = stages_for(7)
    assert layers(found) == [(0, 4)] and found.leaves == (tuple(range(8)),)


def test_two_ranks_that_measured_the_same_layer_tell_how_fast_they_are() -> None:
    measured = {(1, 0): 0.1, (2, 0): 0.2, (1, 1): 0.1, (3, 2): 0.1, (3, 3): 0.1}
    costs, speeds = costs_and_speeds(EVEN, measured, [1, 2, 3])
    assert speeds[1] == pytest.approx(2 * speeds[2], rel=0.02)
    assert costs.layer_s[0] == pytest.approx(0.1 * speeds[1], rel=0.02)


def test_what_a_rank_measured_is_forgotten_with_it_only_if_others_know() -> None:
    timings = Timings()
    timings.take(1, ((0, 0.1), (1, 0.2)))
    timings.take(2, ((1, 0.3), (2, 0.0)))
    timings.forget([1])
    assert timings.known == {(1, 0): 0.1, (2, 1): 0.3}


def test_whoever_leaves_has_one_micro_batch_in_a_stage_that_others_hold_too() -> None:
    before = plan_of(stages_for(1, 2, 3))
    (alone,) = (stage for stage in before.stages if len(stage.ranks) == 1)
    leaver = before.members[alone.ranks[0]]
    found = stages_for(1, 2, 3, held=held_by(before), leaving=[leaver])
    after = plan_of(found)
    rank = after.rank_of(leaver)
    assert len(after.leaves[rank]) == 1 and len(after.team(rank)) > 1
    assert sorted(found.seated) == [1, 2, 3]


def test_nobody_can_take_over_where_every_rank_has_one_micro_batch() -> None:
    with pytest.raises(DoesNotFit, match="every rank has one micro-batch only"):
        stages_for(1, 2, 3, micro_batches=1, held={3: (2, 4)}, leaving=[3])


def test_memory_that_is_too_small_is_said() -> None:
    shape = PipelineShape(stages=2, layer_bytes=(100,) * 4, rank_bytes=150)
    with pytest.raises(DoesNotFit, match="allow more stages, add ranks, or give them more memory"):
        stages_for(1, 2, shape=shape)


def test_what_other_stages_would_save() -> None:
    plan = plan_of(stages_for(1, 2))
    assert gain(plan, EVEN, {}) == pytest.approx(0.0)
    uneven = {(1, 0): 0.3, (1, 1): 0.1, (2, 2): 0.1, (2, 3): 0.1}
    assert gain(plan, EVEN, uneven) == pytest.approx(1 - (0.3 + 8 * 0.3) / (8 * 0.4))


def test_what_other_stages_would_save_is_computed_again_when_more_was_measured() -> None:
    uneven = {(1, 0): 0.3, (1, 1): 0.1, (2, 2): 0.1, (2, 3): 0.1}
    plan, timings = plan_of(stages_for(1, 2)), SimpleNamespace(changes=1, known=uneven)
    membership = SimpleNamespace(first_ready=lambda: SimpleNamespace(pipeline=EVEN))
    control: Any = SimpleNamespace(membership=membership, timings=timings)
    speeds = Speeds(control=control)
    saved = speeds._gain(plan)
    assert saved == gain(plan, EVEN, timings.known) > 0.0
    timings.known = {}
    assert speeds._gain(plan) == saved
    timings.changes = 2
    assert speeds._gain(plan) == pytest.approx(0.0)


def test_a_loss_is_dealt_with_stage_by_stage() -> None:
    plan = plan_of(stages_for(1, 2, 3, 4))
    lost = plan.members[plan.stages[1].ranks[0]]
    after = unplanned(plan, 2, [member for member in plan.members if member != lost], "lost")
    assert [len(stage.ranks) for stage in after.stages] == [2, 1]
    assert [(stage.first, stage.stop) for stage in after.stages] == layers(stages_for(1, 2, 3, 4))
    for stage in plan.stages[:1]:
        assert [after.leaves[rank] for rank in after.stages[0].ranks] == [plan.leaves[rank] for rank in stage.ranks]


def test_a_plan_travels_whole() -> None:
    plan = plan_of(stages_for(1, 2, 3))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.stage_of(0) == plan.stages[0] and plan.seats == 16
    assert isinstance(plan.stages[0], Stage)


def test_what_was_measured_changes_only_by_more_than_noise() -> None:
    timings = Timings()
    timings.take(1, ((0, 0.100), (1, 0.2)))
    timings.take(1, ((0, 0.105), (1, 0.3)))
    assert timings.known == {(1, 0): 0.1, (1, 1): 0.3} and timings.changes == 3
