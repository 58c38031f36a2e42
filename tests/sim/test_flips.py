"""What a flipped bit excuses: only what nobody can see."""

from __future__ import annotations

import pytest

from resilient.core.plan import Address, Place, Plan, Restore
from resilient.core.planner import even_runs
from snapshot.core.branches import Branch
from snapshot.core.inventory import SnapshotKey
from tests.sim.flips import ON_PURPOSE
from tests.sim.rank import Rank
from tests.sim.world import World

FLIPPED_AT = 2
AGREED_ON = 4


def world_of(members: tuple[int, ...]) -> World:
    world = World(0)
    plan = plan_of(1, members)
    for member in members:
        rank = world.ranks[member] = Rank(world, member, "node1")
        rank.layers = range(world.setting.layers)
        rank.seat.plan, rank.seat.has_state, rank.seat.step = plan, True, FLIPPED_AT
    world.plans_on_record[1] = plan
    world.flips.flip_in(world.ranks[1], 0)
    return world


def plan_of(generation: int, members: tuple[int, ...]) -> Plan:
    return Plan(
        generation=generation,
        base=generation - 1,
        kind="planned",
        places=tuple(Place(member=number, node="node1", address=Address(host="h", port=number)) for number in members),
        leaves=even_runs(4, len(members)),
        micro_batches=4,
        joiners=(),
        reason="",
    )


def excused_after_going_back_to(world: World, step: int) -> bool:
    """Because of another flip, which has been found."""
    plan = Plan(
        generation=9,
        base=8,
        kind="restored",
        places=(Place(member=1, node="node1", address=Address(host="h", port=1)),),
        leaves=even_runs(4, 1),
        micro_batches=4,
        joiners=(),
        reason=ON_PURPOSE[0],
        branches=(Branch(number=0), Branch(number=1, parent=0, at_step=step)),
        restore=Restore(key=SnapshotKey(attempt=1, branch=0, step=step, generation=1)),
    )
    world.plans_on_record[9] = plan
    world.flips.created(plan)
    return world.flips.unseen and world.flips.excuses(1, step)


def test_what_only_one_held_is_wrong_for_all_who_have_it_from_there() -> None:
    world = world_of((1,))
    world.flips.agreed(plan_of(2, (1, 3)), AGREED_ON)
    assert excused_after_going_back_to(world, AGREED_ON)


def test_who_held_what_is_right_sees_it_as_long_as_it_lives() -> None:
    world = world_of((1, 2))
    world.flips.agreed(plan_of(2, (1, 2)), AGREED_ON)
    assert not excused_after_going_back_to(world, AGREED_ON)


def test_who_has_died_before_anybody_compared_sees_nothing() -> None:
    world = world_of((1, 2))
    world.ranks[2].alive = False
    world.flips.agreed(plan_of(2, (1, 3)), AGREED_ON)
    assert excused_after_going_back_to(world, AGREED_ON)


@pytest.mark.parametrize("step", [FLIPPED_AT - 1, FLIPPED_AT])
def test_from_before_it_flipped_nothing_is_excused(step: int) -> None:
    world = world_of((1,))
    world.flips.agreed(plan_of(2, (1, 3)), AGREED_ON)
    assert not excused_after_going_back_to(world, step)


def test_without_a_comparison_since_nothing_is_excused() -> None:
    world = world_of((1,))
    world.flips.agreed(plan_of(2, (1, 3)), FLIPPED_AT)
    assert not excused_after_going_back_to(world, FLIPPED_AT + 1)
