"""The cheapest seating against all seatings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from resilient.core.seating import cheapest_seats


def deals(count: int, places: int) -> Iterator[tuple[int, ...]]:
    """All ways to put so many alike on places."""
    return (each for each in product(range(count + 1), repeat=places) if sum(each) == count)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_no_seating_is_cheaper(groups: int, stages: int, data: st.DataObject) -> None:
    row = st.lists(st.integers(0, 9), min_size=stages, max_size=stages)
    cost = data.draw(st.lists(row, min_size=groups, max_size=groups))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=groups, max_size=groups))
    least = data.draw(st.lists(st.integers(0, 3), min_size=stages, max_size=stages))
    most = [low + data.draw(st.integers(0, 6)) for low in least]
    assume(sum(least) <= sum(sizes) <= sum(most))
    seats, found = cheapest_seats(np.array(cost, np.int64), sizes, least, most)
    assert seats.sum(1).tolist() == sizes
    assert all(low <= filled <= high for low, filled, high in zip(least, seats.sum(0).tolist(), most, strict=True))
    assert found == price(cost, seats.tolist())
    assert found == min(
        price(cost, every)
        for every in product(*(deals(size, stages) for size in sizes))
        if all(
            low <= sum(column) <= high for low, column, high in zip(least, zip(*every, strict=True), most, strict=True)
        )
    )


def price(cost: Sequence[Sequence[int]], seats: Sequence[Sequence[int]]) -> int:
    return sum(
        one * count for costs, counts in zip(cost, seats, strict=True) for one, count in zip(costs, counts, strict=True)
    )
