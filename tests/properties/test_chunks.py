"""Owners of optimizer chunks against all owners that there could be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement, pairwise, product

from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.core.chunks import chunk_owners, most_bytes

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=7)


def loads(chunk_bytes: Sequence[int], ranks: Sequence[int], owners: Sequence[int]) -> list[int]:
    assert len(owners) == len(chunk_bytes) and set(owners) <= set(ranks)
    return [sum(size for size, owner in zip(chunk_bytes, owners, strict=True) if owner == rank) for rank in ranks]


def moved_bytes(chunk_bytes: Sequence[int], former: Sequence[int | None], owners: Sequence[int]) -> int:
    pairs = zip(chunk_bytes, former, owners, strict=True)
    return sum(size for size, before, after in pairs if before != after)


def runs(count: int, ranks: int) -> list[list[int]]:
    """Every way to give each rank a run, which may be empty."""
    found = []
    for cuts in combinations_with_replacement(range(count + 1), ranks - 1):
        ends = pairwise((0, *cuts, count))
        found.append([rank for rank, (start, stop) in enumerate(ends) for _ in range(start, stop)])
    return found


@settings(deadline=None)
@given(SIZES, st.integers(1, 4))
def test_no_runs_have_a_smaller_largest(chunk_bytes: list[int], ranks: int) -> None:
    named = [10 * rank for rank in range(ranks)]
    owners = chunk_owners(chunk_bytes, named)
    assert list(owners) == sorted(owners)
    least = min(max(loads(chunk_bytes, range(ranks), every)) for every in runs(len(chunk_bytes), ranks))
    assert max(loads(chunk_bytes, named, owners)) == least


@settings(deadline=None)
@given(SIZES, st.integers(1, 3), st.data())
def test_little_moves_and_nobody_has_much_more_than_an_even_share(
    chunk_bytes: list[int], ranks: int, data: st.DataObject
) -> None:
    count = len(chunk_bytes)
    gone = [None, 7, 8]
    former = data.draw(st.lists(st.sampled_from([*range(ranks), *gone]), min_size=count, max_size=count))
    owners = chunk_owners(chunk_bytes, range(ranks), former)
    assert owners == chunk_owners(chunk_bytes, range(ranks), former)
    limit = most_bytes(chunk_bytes, ranks)
    assert max(loads(chunk_bytes, range(ranks), owners)) <= limit
    if not any(owner in range(ranks) for owner in former):
        assert owners == chunk_owners(chunk_bytes, range(ranks))
        return
    allowed = [
        every for every in product(range(ranks), repeat=count) if max(loads(chunk_bytes, range(ranks), every)) <= limit
    ]
    least = min(moved_bytes(chunk_bytes, former, every) for every in allowed)
    before = [
        sum(size for size, owner in zip(chunk_bytes, former, strict=True) if owner == rank) for rank in range(ranks)
    ]
    loaded = sum(each > limit for each in before)
    assert least <= moved_bytes(chunk_bytes, former, owners) <= least + loaded * max(max(chunk_bytes) - 1, 0)
    if len(set(chunk_bytes)) == 1 or not loaded:
        assert moved_bytes(chunk_bytes, former, owners) == least


@given(st.lists(st.sampled_from([4096, 4096, 4096, 100]), min_size=1, max_size=200), st.data())
def test_ranks_come_and_go(chunk_bytes: list[int], data: st.DataObject) -> None:
    owners: tuple[int, ...] = ()
    for _ in range(4):
        ranks = sorted(data.draw(st.sets(st.integers(0, 9), min_size=1)))
        owners = chunk_owners(chunk_bytes, ranks, owners)
        assert max(loads(chunk_bytes, ranks, owners)) <= most_bytes(chunk_bytes, len(ranks))
