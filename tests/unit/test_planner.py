"""Who owns which micro-batches: every leaf once, and after a loss nothing taken from anybody."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from resilient.core.plan import Address, Place, Plan
from resilient.core.planner import dealt_anew, even_runs, unbalanced, unplanned


def plan_of(micro_batches: int, members: list[int]) -> Plan:
    places = [Place(member=number, node=f"node{number}", address=Address(host="h", port=number)) for number in members]
    return dealt_anew(
        generation=1,
        base=0,
        kind="initial",
        places=places,
        joiners=members[1:],
        micro_batches=micro_batches,
        reason="test",
    )


@st.composite
def losses(draw: st.DrawFn) -> tuple[Plan, list[list[int]]]:
    """A plan, and the survivors after each of several losses."""
    ranks = draw(st.integers(2, 8))
    plan = plan_of(draw(st.integers(ranks, 24)), list(range(10, 10 + ranks)))
    rounds, left = [], list(plan.members)
    while len(left) > 1 and draw(st.booleans()):
        dead = draw(st.sets(st.sampled_from(left), min_size=1, max_size=len(left) - 1))
        left = [member for member in left if member not in dead]
        rounds.append(left)
    return plan, rounds


@given(losses())
def test_a_loss_only_adds_leaves_to_owners(case: tuple[Plan, list[list[int]]]) -> None:
    plan, rounds = case
    for generation, survivors in enumerate(rounds, start=2):
        after = unplanned(plan, generation, survivors, "a loss")  # a plan checks that each leaf is dealt once
        assert after.members == tuple(member for member in plan.members if member in survivors)
        assert after.base == plan.generation
        for member in after.members:
            assert set(plan.leaves_of(member)) <= set(after.leaves_of(member))
        plan = after


@given(losses())
def test_lost_leaves_go_to_those_who_have_least(case: tuple[Plan, list[list[int]]]) -> None:
    plan, rounds = case
    for survivors in rounds:
        after = unplanned(plan, 2, survivors, "a loss")
        took = [member for member in survivors if len(after.leaves_of(member)) > len(plan.leaves_of(member))]
        least = min(len(after.leaves_of(member)) for member in survivors)
        assert all(len(after.leaves_of(member)) <= least + 1 for member in took)


@given(st.integers(1, 64), st.data())
def test_even_runs_are_contiguous_and_even(micro_batches: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, micro_batches))
    runs = even_runs(micro_batches, ranks)
    assert [leaf for run in runs for leaf in run] == list(range(micro_batches))
    assert len(runs) == ranks
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_dealing_anew_is_asked_for_only_where_it_helps() -> None:
    plan = plan_of(8, [1, 2, 3, 4])
    assert not unbalanced(plan)
    lost_one = unplanned(plan, 2, [1, 2, 3], "lost rank 3")
    assert lost_one.leaves == ((0, 1), (2, 3, 7), (4, 5, 6))
    assert not unbalanced(lost_one)
    lopsided = replace(plan_of(4, [1, 2]), leaves=((0, 1, 2), (3,)))
    assert unbalanced(lopsided)


def test_a_plan_survives_its_json() -> None:
    plan = unplanned(plan_of(9, [1, 2, 3]), 2, [1, 3], "lost rank 1")
    assert Plan.from_json(plan.to_json()) == plan
