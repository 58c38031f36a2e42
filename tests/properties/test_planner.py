"""Lost leaves dealt by looking at their neighbours only, against looking at everybody."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from resilient.core.plan import Address, Place, Plan
from resilient.core.planner import SMALL_GAIN, deal_lost, dealt_anew, even_runs, in_proportion, slowest_s, unplanned


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


@given(st.integers(1, 9), st.lists(st.sampled_from([0.1, 0.11, 0.2, 0.3, 1.0]), min_size=1, max_size=4))
def test_no_dealing_is_faster_than_that_in_proportion_but_even_ones_are_preferred(
    micro_batches: int, leaf_s: list[float]
) -> None:
    ranks = len(leaf_s)
    assume(ranks <= micro_batches)
    runs = in_proportion(micro_batches, leaf_s)
    assert [leaf for run in runs for leaf in run] == list(range(micro_batches)) and all(runs)
    every = product(range(1, micro_batches + 1), repeat=ranks)
    best_s = min(
        max(count * each for count, each in zip(counts, leaf_s, strict=True))
        for counts in every
        if sum(counts) == micro_batches
    )
    assert slowest_s(runs, leaf_s) <= best_s * (1 + SMALL_GAIN) + 1e-9
    if runs != even_runs(micro_batches, ranks):
        assert slowest_s(runs, leaf_s) <= best_s + 1e-9
        assert slowest_s(even_runs(micro_batches, ranks), leaf_s) > best_s * (1 + SMALL_GAIN)
