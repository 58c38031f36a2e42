"""How long the ranks of a pipeline's stages had nothing to do, as they tell it and as it is shown."""

from __future__ import annotations

import pytest

from resilient.core.bubbles import Bubble, Bubbles, bubble_of, in_words


def bubble(stage: int, rank_steps: int, idle: float, ranks: tuple[int, ...] = (1, 2)) -> Bubble:
    return Bubble(ranks=ranks, stage=stage, by_schedule=None, rank_steps=rank_steps, idle=idle)


def test_the_known_share() -> None:
    assert bubble_of(1, 8) == 0.0
    assert bubble_of(4, 8) == 3 / 11


def test_a_rank_counts_by_layout_and_stage() -> None:
    own = Bubbles()
    for each in (bubble(0, 1, 0.2), bubble(0, 1, 0.4), bubble(1, 1, 0.5), bubble(0, 1, 0.1, (3,))):
        own.add(each)
    assert own.told() == (bubble(0, 2, pytest.approx(0.6)), bubble(1, 1, 0.5), bubble(0, 1, 0.1, (3,)))


def test_what_is_told_again_counts_once_and_what_the_dead_have_told_stays() -> None:
    all_of_them = Bubbles()
    all_of_them.take(7, (bubble(1, 2, 1.0),))  # and then it dies
    for told in ((bubble(1, 1, 0.25),), (bubble(1, 1, 0.25),), (bubble(1, 2, 0.5), bubble(0, 1, 0.75))):
        all_of_them.take(8, told)
    assert all_of_them.as_values() == [
        {"ranks": [1, 2], "stage": 0, "rank_steps": 1, "idle": 0.75, "by_schedule": None},
        {"ranks": [1, 2], "stage": 1, "rank_steps": 4, "idle": 0.375, "by_schedule": None},
    ]


def test_in_words() -> None:
    rows = Bubbles()
    even = Bubble(ranks=(1, 1), stage=0, by_schedule=0.25, rank_steps=10, idle=3.0)
    rows.take(1, (even, bubble(0, 2, 1.0)))
    rows.take(2, (Bubble(ranks=(1, 1), stage=1, by_schedule=0.25, rank_steps=10, idle=2.5),))
    said = "idle in forward and backward, by stage of 2: 30%, 25%; the schedule alone would leave 25%"
    assert in_words(rows.as_values()) == said
    assert in_words([]) == ""
    rows = Bubbles()
    rows.take(1, (bubble(0, 2, 1.0),))
    assert in_words(rows.as_values()) == "idle in forward and backward, by stage of 2: 50%"
