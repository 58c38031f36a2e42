"""What goes from whom to whom when layers change hands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.pending import LinkBroken
from resilient.core.moves import divided, transfers, without
from resilient.moving import check_received, differing
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
    told = [{"0": 5, "": 9}, {"1": 6, "": 9}, {"1": 7, "": 9}]
    assert differing([(0, 1), (1, 2), (0, 0)], told) == {}, "whoever had layer 1 had it alone"
    with pytest.raises(LinkBroken, match="layer 1 was not received as it was sent"):
        check_received(told)


def test_holders_that_differed_before_are_told_from_receivers() -> None:
    told = [{"0,3": 5, "": 9}, {"0,3": 6, "": 9}, {"0,3": 7, "": 8}]
    assert differing([(0, 1), (3, 4), (0, 0)], told) == {"layer 0,3": {0: 5, 1: 6}}
    assert differing([(0, 1), (3, 4), (1, 2)], told) == {
        "layer 0,3": {0: 5, 1: 6},
        "what belongs to no layer": {0: 9, 1: 9, 2: 8},
    }


def test_equal_bytes_pass() -> None:
    told = [{"0": 5, "": 9}, {"0": 5, "": 9}]
    assert differing([(0, 1), (0, 0)], told) == {}
    check_received(told)


def test_what_comes_later_is_told_apart_from_what_comes_first() -> None:
    moves = transfers([((0, 100),), ((0, 100),), ()], [(), (), ((10, 90),)])
    first, then = divided(moves, ((20, 40), (60, 70)))
    assert sorted((each.start, each.stop) for each in first) == [(10, 20), (40, 50), (50, 60), (70, 90)]
    assert sorted((each.start, each.stop) for each in then) == [(20, 40), (60, 70)]
    senders = {each.start: each.sender for each in (*first, *then)}
    assert all(senders[start] == (0 if start < 50 else 1) for start in senders), "from the same ones"
