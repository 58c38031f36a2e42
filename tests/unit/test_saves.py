"""Which states are made durable."""

from __future__ import annotations

from resilient.core.saves import Saves


def due(saves: Saves, steps: range, *, step_s: float = 1.0) -> list[int]:
    found = []
    for step in steps:
        if saves.is_due(step, step * step_s):
            saves.saved(step, step * step_s)
            found.append(step)
    return found


def test_every_so_many_steps_and_the_last() -> None:
    assert due(Saves(every_steps=4, last_step=11), range(1, 12)) == [4, 8, 11]


def test_what_was_postponed_is_still_due_and_the_next_one_is_where_it_would_have_been() -> None:
    saves = Saves(every_steps=4)
    assert [saves.is_due(step, 0.0) for step in range(1, 7)] == [False] * 3 + [True] * 3
    saves.saved(6, 0.0)
    assert due(saves, range(7, 13)) == [8, 12]


def test_every_so_many_seconds() -> None:
    assert due(Saves(every_s=10.0), range(1, 13), step_s=2.0) == [6, 11]


def test_who_goes_back_or_begins_in_the_middle_counts_from_there() -> None:
    saves = Saves(every_steps=10)
    assert due(saves, range(95, 112)) == [100, 110]
    assert due(saves, range(103, 112)) == [110]
