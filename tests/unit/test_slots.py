"""Where a state is cut, which slot is written, and how often: the pure parts of taking snapshots."""

from __future__ import annotations

import itertools

import pytest

from resilient.core.cadence import ENOUGH, Cadence
from snapshot.core.chunks import CHUNK_ELEMENTS, chunk_ends, ends_within, share_of
from snapshot.core.lifecycle import Lifecycle, Ordinal

# Cuts


def test_chunks_end_with_their_tensor_and_begin_at_fixed_places() -> None:
    ends = chunk_ends([(3, 4), (0, 8), (CHUNK_ELEMENTS + 1, 2), (1, 1)])
    assert ends == (12, 12 + 2 * CHUNK_ELEMENTS, 14 + 2 * CHUNK_ELEMENTS, 15 + 2 * CHUNK_ELEMENTS)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 20])
def test_shares_are_whole_chunks_and_together_everything(world: int) -> None:
    ends = chunk_ends([(elements, 4) for elements in (1, 700_000, 0, 3, 50_000, 50_000, 9)])
    shares = [share_of(ends, rank, world) for rank in range(world)]
    assert shares[0][0] == 0 and shares[-1][1] == ends[-1]
    for (_, stop), (start, _) in itertools.pairwise(shares):
        assert stop == start
    assert all(start in (0, *ends) and stop in (0, *ends) for start, stop in shares)
    within = [end + start for start, stop in shares for end in ends_within(ends, [(start, stop)])]
    assert within == list(ends)


def test_a_state_without_bytes_has_empty_shares() -> None:
    assert [share_of((), rank, 2) for rank in range(2)] == [(0, 0), (0, 0)]


# Slots


def test_what_is_given_up_is_what_nobody_will_go_back_to() -> None:
    lifecycle = Lifecycle()
    first, second, third = (Ordinal(0, step) for step in (1, 2, 3))
    for number, ordinal in enumerate((first, second, third)):
        lifecycle.begin(number, ordinal)
        assert number == 0 or lifecycle.make_way(None, None) == [(first, second)[number - 1]], "written ones stay"
        lifecycle.commit()
    assert lifecycle.make_way(None, None) == lifecycle.make_way(second, None) == [third]
    assert not lifecycle.widened


def test_where_any_may_be_protected_everywhere_there_is_one_slot_more_once() -> None:
    lifecycle = Lifecycle()
    first, second, third, fourth = (Ordinal(0, step) for step in (1, 2, 3, 4))
    for number, ordinal in enumerate((first, second, third)):
        lifecycle.begin(number, ordinal)
        lifecycle.commit()
    lifecycle.everywhere = first
    assert lifecycle.make_way(third, None) == [] and lifecycle.free_for_any == [3]
    lifecycle.begin(3, fourth)
    lifecycle.commit()
    assert lifecycle.make_way(third, None) == [fourth]
    assert lifecycle.make_way(fourth, None) == [second], "there is no other way now"
    lifecycle.protected(fourth)
    assert lifecycle.free == [0, 1, 2]


def test_without_memory_for_one_slot_more_something_is_given_up() -> None:
    lifecycle = Lifecycle()
    first, second, third = (Ordinal(0, step) for step in (1, 2, 3))
    for number, ordinal in enumerate((first, second, third)):
        lifecycle.begin(number, ordinal)
        lifecycle.commit()
    assert lifecycle.make_way(third, None) == []
    lifecycle.narrow()
    assert not lifecycle.free and lifecycle.make_way(third, None) == [first]


def test_the_newest_protected_snapshot_and_all_after_it_stay() -> None:
    slots = Lifecycle()
    for step in (1, 2, 3):
        slots.begin(slots.free[0], Ordinal(0, step))
        slots.commit()
    assert slots.free == []
    slots.protected(Ordinal(0, 2))
    assert slots.free == [0] and slots.slots == [None, Ordinal(0, 2), Ordinal(0, 3)]


def test_what_can_no_longer_be_protected_goes_when_a_newer_one_is() -> None:
    slots = Lifecycle()
    for step in (1, 2, 3):
        slots.begin(slots.free[0], Ordinal(0, step))
        slots.commit()
    slots.protected(Ordinal(0, 3))
    assert slots.slots == [None, None, Ordinal(0, 3)]


def test_what_will_never_be_protected_makes_room_but_for_what_is() -> None:
    slots = Lifecycle()
    for step in (1, 2, 3):
        slots.begin(slots.free[0], Ordinal(0, step))
        slots.commit()
    slots.protected(Ordinal(0, 1))
    slots.never_protected([Ordinal(0, 1), Ordinal(0, 2), Ordinal(0, 7)])
    assert slots.slots == [Ordinal(0, 1), None, Ordinal(0, 3)]


def test_one_slot_is_written_at_a_time_and_may_be_given_up() -> None:
    slots = Lifecycle()
    slots.begin(0, Ordinal(0, 1))
    with pytest.raises(AssertionError):
        slots.begin(1, Ordinal(0, 2))
    slots.give_up()
    assert slots.free == [0, 1, 2]


def test_what_is_made_durable_is_kept_and_has_a_slot_that_nothing_else_takes() -> None:
    slots = Lifecycle(durable=True)
    for step in (1, 2, 3):
        slots.begin(slots.free_for_any[0], Ordinal(0, step))
        slots.commit()
    assert slots.free == [3] and slots.free_for_any == []
    slots.begin(3, Ordinal(0, 4), durable=True)
    slots.commit()
    slots.protected(Ordinal(0, 4))
    for step in (5, 6, 7):
        slots.begin(slots.free_for_any[0], Ordinal(0, step))
        slots.commit()
    slots.never_protected([Ordinal(0, 4)])
    slots.protected(Ordinal(0, 6))
    assert Ordinal(0, 4) in slots.slots and len(slots.free) == 1
    slots.settled(Ordinal(0, 4))
    assert Ordinal(0, 4) not in slots.slots and len(slots.free_for_any) == 2


def test_what_was_to_be_made_durable_and_is_given_up_makes_room_for_the_next() -> None:
    slots = Lifecycle(durable=True)
    slots.begin(0, Ordinal(0, 1), durable=True)
    slots.give_up()
    assert slots.kept is None and slots.free == [0, 1, 2, 3]
    slots.begin(0, Ordinal(0, 2), durable=True)
    slots.commit()
    slots.begin(1, Ordinal(0, 3))
    slots.give_up()
    assert slots.kept == Ordinal(0, 2)


def test_a_later_branch_is_newer_whatever_its_step_is() -> None:
    slots = Lifecycle()
    slots.begin(0, Ordinal(0, 9))
    slots.commit()
    slots.begin(1, Ordinal(1, 4))
    slots.commit()
    slots.protected(Ordinal(1, 4))
    assert slots.slots == [None, Ordinal(1, 4), None]


@pytest.mark.parametrize("ordinal", [Ordinal(0, 0), Ordinal(0, 7), Ordinal(3, 2)])
def test_ordinals_are_packed_in_their_order(ordinal: Ordinal) -> None:
    assert Ordinal.unpacked(ordinal.packed()) == ordinal
    assert (
        ordinal.packed() < Ordinal(ordinal.branch, ordinal.step + 1).packed() < Ordinal(ordinal.branch + 1, 0).packed()
    )
    assert Ordinal.unpacked(-1) is None


# How often


def test_every_n_steps() -> None:
    cadence = Cadence(every=3, budget=0.02)
    assert [step for step in range(1, 10) if cadence.is_due(step, None, 3)] == [3, 6, 9]
    assert cadence.decide() is None


def fed(cadence: Cadence, plain_s: float, cost_s: float, waited_s: float = 0.0) -> str | None:
    for _ in range(ENOUGH):
        cadence.measured(plain_s, captured=False, waited_s=0.0)
        cadence.measured(plain_s + cost_s, captured=True, waited_s=waited_s)
    return cadence.decide()


def test_auto_stays_within_its_budget_and_says_so() -> None:
    cadence = Cadence(every="auto", budget=0.02)
    said = fed(cadence, 0.100, 0.010)
    assert cadence.interval == 5
    assert said is not None and "every 5 steps" in said and "10.0 ms" in said and "2.0%" in said


def test_auto_captures_every_step_when_that_costs_nothing() -> None:
    cadence = Cadence(every="auto", budget=0.02)
    assert fed(cadence, 0.100, 0.0) is not None
    assert cadence.interval == 1


def test_auto_counts_what_was_waited_for_even_if_steps_look_as_short() -> None:
    cadence = Cadence(every="auto", budget=0.02)
    fed(cadence, 0.100, 0.0, waited_s=0.006)
    assert cadence.interval == 3


def test_auto_lengthens_when_protection_does_not_keep_up() -> None:
    cadence = Cadence(every="auto", budget=0.02)
    fed(cadence, 0.100, 0.0)
    cadence.skipped()
    for _ in range(ENOUGH):
        cadence.measured(0.1, captured=True, waited_s=0.0)
    cadence.decide()
    assert cadence.interval == 2


@pytest.mark.parametrize(
    ("interval", "cost_s", "then"), [(5, 0.0099, 5), (5, 0.0119, 5), (5, 0.0081, 5), (5, 0.0139, 7), (4, 0.0099, 5)]
)
def test_auto_changes_only_by_more_than_noise(interval: int, cost_s: float, then: int) -> None:
    cadence = Cadence(every="auto", budget=0.02)
    cadence.interval = interval
    assert (fed(cadence, 0.100, cost_s) is None) == (then == interval)
    assert cadence.interval == then


def test_auto_counts_from_the_last_capture_at_the_agreed_interval() -> None:
    cadence = Cadence(every="auto", budget=0.02)
    assert cadence.is_due(7, None, 5)
    assert not cadence.is_due(9, 7, 5) and cadence.is_due(12, 7, 5)
    assert cadence.is_due(4, 7, 5), "after a rollback"
