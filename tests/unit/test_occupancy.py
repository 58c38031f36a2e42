"""How many ranks fit on a node that other jobs use, too."""

from __future__ import annotations

from resilient.core.occupancy import Occupancy


def test_room_is_what_is_free_and_what_we_hold() -> None:
    places = Occupancy(patience_s=10.0)
    assert places.room("a", total=4, free=3) == 3, "another job uses one"
    places.ordered(1, "a", 0.0)
    places.ordered(2, "a", 0.0)
    assert places.room("a", total=4, free=3) == 3, "ordered, not placed yet"
    assert places.room("a", total=4, free=1) == 2, "placed, not begun yet"
    places.shown("a", {1, 2})
    assert places.room("a", total=4, free=1) == 3
    assert places.room("a", total=4, free=2) == 4, "the other job has ended"
    places.ended(1, "a")
    assert places.room("a", total=4, free=3) == 4
    assert places.room("b", total=2, free=7) == 2


def test_who_does_not_begin_where_nothing_is_free_is_withdrawn_and_the_next_may_take_longer() -> None:
    places, withdrawn = Occupancy(patience_s=10.0), []
    for turn in range(3):
        at = 1000.0 * turn
        places.ordered(turn, "a", at)
        assert places.withdrawn({"a": 1, "b": 1}, at + 500.0) == ()
        assert places.withdrawn({"a": 0, "b": 0}, at + 500.0) == (), "there is no better place"
        while not (found := places.withdrawn({"a": 0, "b": 1}, at)):
            at += 1.0
        assert found == ((turn, "a"),) and places.room("a", total=1, free=0) == 0
        withdrawn.append(at - 1000.0 * turn)
    assert withdrawn == [11.0, 21.0, 41.0]
    places.ordered(9, "a", 5000.0)
    places.shown("a", {9})
    places.ended(9, "a")
    places.ordered(10, "a", 6000.0)
    assert places.withdrawn({"a": 0, "b": 1}, 6011.0) == ((10, "a"),), "it does begin here"


def test_who_has_begun_is_never_withdrawn() -> None:
    places = Occupancy(patience_s=10.0)
    places.shown("a", {1})
    places.ordered(1, "a", 0.0)
    places.ordered(2, "a", 0.0)
    places.node_gone("a")
    assert places.withdrawn({"a": 0}, 1e6) == () and places.room("a", total=2, free=0) == 0


def test_who_is_shown_no_more_holds_no_place() -> None:
    """It was shown once more after it was killed, and the keeper that saw it die has died itself."""
    places = Occupancy(patience_s=10.0)
    places.shown("a", {1, 2})
    places.ended(1, "a")
    places.shown("a", {1, 2})
    places.shown("a", {2})
    assert places.room("a", total=2, free=0) == 1


def test_patience_does_not_grow_for_ever() -> None:
    places = Occupancy(patience_s=10.0)
    for turn in range(20):
        places.ordered(turn, "a", 1e4 * turn)
        assert places.withdrawn({"a": 0, "b": 1}, 1e4 * turn + 161.0)
