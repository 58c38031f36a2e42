"""Lost leaves dealt by looking at their neighbours only, against looking at everybody."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.core.plan import Address, Place, Plan
from resilient.core.planner import deal_lost, dealt_anew, unplanned


def obviously(plan: Plan, survivors: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    owned = {member: list(plan.leaves_of(member)) for member in survivors}
    kept = {index for leaves in owned.values() for index in leaves}
    for index in range(plan.micro_batches):
        if index not in kept:
            taker = min(
                survivors,
                key=lambda member: (
                    len(owned[member]),
                    min(abs(index - own) for own in owned[member]),
                    plan.rank_of(member),
                ),
            )
            owned[taker].append(index)
    return tuple(tuple(sorted(owned[member])) for member in survivors)


@settings(deadline=None)  # a busy machine is no finding
@given(st.integers(2, 12), st.integers(0, 40), st.data())
def test_lost_leaves_go_where_a_look_at_everybody_would_send_them(ranks: int, more: int, data: st.DataObject) -> None:
    plan = dealt_anew(
        generation=1,
        base=0,
        kind="initial",
        places=[Place(member=number, node="a", address=Address(host="h", port=1)) for number in range(ranks)],
        joiners=[],
        micro_batches=ranks + more,
        reason="test",
    )
    left = list(plan.members)
    while len(left) > 1:
        left = sorted(data.draw(st.sets(st.sampled_from(left), min_size=1, max_size=len(left) - 1)))
        assert deal_lost(plan, left) == obviously(plan, left)
        plan = unplanned(plan, plan.generation + 1, left, "a loss")
