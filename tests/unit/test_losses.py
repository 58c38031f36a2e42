"""The curve of losses: bounded, honest about what is not finite, and told bit by bit."""

from __future__ import annotations

import itertools
import math

from resilient.core.losses import Losses


def test_however_long_the_run_the_points_are_few_and_evenly_spread() -> None:
    losses = Losses(most=100)
    for step in range(10_000):
        losses.add(step, float(step))
    points = losses.after(-1)
    assert 50 <= len(points) <= 100
    assert {other - one for (one, _), (other, _) in itertools.pairwise(points)} == {losses.every}
    assert all(value == step for step, value in points)
    assert losses.newest == (9999, 9999.0)


def test_what_is_not_finite_is_none() -> None:
    losses = Losses()
    for step, loss in enumerate((1.0, math.nan, math.inf)):
        losses.add(step, loss)
    assert losses.after(-1) == [(0, 1.0), (1, None), (2, None)]


def test_going_back_drops_what_is_no_more_on_the_line() -> None:
    losses = Losses()
    for step in range(10):
        losses.add(step, 1.0)
    before = losses.edition
    losses.back_to(4)
    assert losses.newest == (3, 1.0) and losses.edition != before
    losses.add(4, 2.0)
    assert losses.after(2) == [(3, 1.0), (4, 2.0)]
    losses.back_to(0)
    assert losses.newest is None and losses.after(-1) == []


def test_whoever_asks_for_what_is_new_has_all_or_learns_of_another_edition() -> None:
    losses, known, edition = Losses(most=20), dict[int, float | None](), -1
    for step in [*range(0, 30, 2), *range(1, 30, 2), *range(30, 200), 7]:
        losses.add(step, step / 2)
        if losses.edition != edition:
            known, edition = {}, losses.edition
        known.update(losses.after(max(known, default=-1)))
        assert sorted(known.items()) == losses.after(-1)


def test_a_step_that_is_told_again_changes_nothing() -> None:
    losses = Losses()
    for step in (0, 1, 2, 1, 0):
        losses.add(step, 1.0)
    assert losses.edition == 0 and len(losses.after(-1)) == 3


def test_another_one_goes_on_where_one_has_ended() -> None:
    first, second = Losses(most=4), Losses(most=4)
    for step in range(9):
        first.add(step, float(step))
    second.take_up(first.every, first.after(-1), first.newest)
    for losses in (first, second):
        for step in range(7, 20):
            losses.add(step, float(step))
    assert (second.after(-1), second.every, second.newest) == (first.after(-1), first.every, first.newest)
