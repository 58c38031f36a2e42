"""What goes from whom to whom when layers change hands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.group import LinkBroken
from resilient.core.moves import transfers, without
from resilient.errors import StateDiverged
from resilient.moving import check_equal
from snapshot.core.ranges import Ranges, merged

SIZE = 24
byte_sets = st.sets(st.integers(0, SIZE - 1))


def ranges(numbers: set[int]) -> Ranges:
    return merged((number, number + 1) for number in numbers)


def numbers(found: Ranges) -> set[int]:
    return {number for start, stop in found for number in range(start, stop)}


@given(byte_sets, byte_sets)
def test_without(one: set[int], other: set[int]) -> None:
    assert numbers(without(ranges(one), ranges(other))) == one - other


@given(st.lists(st.tuples(byte_sets, byte_sets), min_size=1, max_size=5))
def test_everybody_gets_what_they_lack_once_from_somebody_who_has_it(world: list[tuple[set[int], set[int]]]) -> None:
    has = [held for held, _ in world]
    wants = [wanted & set().union(*has) for _, wanted in world]
    found = transfers([ranges(held) for held in has], [ranges(wanted) for wanted in wants])
    for receiver, wanted in enumerate(wants):
        got = [set(range(each.start, each.stop)) for each in found if each.receiver == receiver]
        assert sum(map(len, got)) == len(set().union(*got)), "sent twice"
        assert set().union(*got) == wanted - has[receiver]
    assert all(set(range(each.start, each.stop)) <= has[each.sender] for each in found)


def test_all_who_have_it_share_the_work() -> None:
    found = transfers([((0, 12),), ((0, 12),), ()], [(), (), ((0, 12),)])
    assert [(each.sender, each.start, each.stop) for each in found] == [(0, 0, 6), (1, 6, 12)]


def test_what_nobody_has_is_said() -> None:
    with pytest.raises(ValueError, match=r"nobody has bytes \(\(4, 8\),\) of the state, which rank 1 needs"):
        transfers([((0, 4),), ()], [(), ((0, 8),)])


def test_a_layer_that_arrived_damaged_is_found() -> None:
    with pytest.raises(LinkBroken, match="layer 1 was not received as it was sent"):
        check_equal([(0, 1), (1, 2), (0, 0)], [{"0": 5, "": 9}, {"1": 6, "": 9}, {"1": 7, "": 9}])


def test_ranks_that_differed_before_are_named() -> None:
    with pytest.raises(StateDiverged, match="layer 0,3: ranks 0, 1 hold different bytes of it"):
        check_equal([(0, 1), (3, 4)], [{"0,3": 5}, {"0,3": 6}])


def test_equal_bytes_pass() -> None:
    check_equal([(0, 1), (0, 0)], [{"0": 5, "": 9}, {"0": 5, "": 9}])
