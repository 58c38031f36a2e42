"""Stages against everything that could be done: all cuts, and all ways to put ranks on stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.core import cuts, movement
from resilient.core.chain import Costs, Rank, kinds_of
from resilient.core.partition import DoesNotFit, Partition, partition
from resilient.core.planner import SMALL_GAIN

Seats = tuple[tuple[int, ...], tuple[int | None, ...]]
"""A cut, and the stage of each rank."""
patient = settings(deadline=None, max_examples=120)  # a busy machine is no finding


# The obvious twin


def every_seating(costs: Costs, ranks: Sequence[Rank], stages: int, micro_batches: int) -> Iterator[Seats]:
    """All that may be answered, whatever it costs."""
    wanted = min(stages, costs.layers, len(ranks))
    limited = any(rank.memory_bytes is not None for rank in ranks)
    fewest = min(wanted, -(-len(ranks) // micro_batches)) if limited else wanted
    for count in range(fewest, wanted + 1):
        unseated = max(0, len(ranks) - count * micro_batches)
        places: tuple[int | None, ...] = (*range(count), *([None] if unseated else []))
        for inner in combinations(range(1, costs.layers), count - 1):
            cut = (0, *inner, costs.layers)
            for seats in product(places, repeat=len(ranks)):
                filled = [seats.count(stage) for stage in range(count)]
                if not all(1 <= each <= micro_batches for each in filled) or seats.count(None) != unseated:
                    continue
                if fits(costs, ranks, cut, seats):
                    yield cut, seats


def fits(costs: Costs, ranks: Sequence[Rank], cut: Sequence[int], seats: Sequence[int | None]) -> bool:
    weights = [sum(costs.layer_bytes[first:stop]) for first, stop in pairwise(cut)]
    pairs = zip(ranks, seats, strict=True)
    return not any(
        stage is not None and rank.memory_bytes is not None and weights[stage] > rank.memory_bytes
        for rank, stage in pairs
    )


def step_of(costs: Costs, ranks: Sequence[Rank], found: Seats, micro_batches: int) -> float:
    """The layers before a stage once, on ranks as most are, and then the rank of the stage that computes longest."""
    cut, seats = found
    worst = 0.0
    for stage, (first, stop) in enumerate(pairwise(cut)):
        stage_s = sum(costs.layer_s[first:stop])
        speeds = [rank.speed for rank, seat in zip(ranks, seats, strict=True) if seat == stage]
        before_s = sum(costs.layer_s[:first]) / usual_speed(ranks)
        worst = max(worst, before_s + shortest_s(stage_s, tuple(speeds), micro_batches))
    return worst


def usual_speed(ranks: Sequence[Rank]) -> float:
    return kinds_of(ranks, range(len(ranks)))[0].speed


def shortest_s(stage_s: float, speeds: tuple[float, ...], micro_batches: int) -> float:
    """One micro-batch for each at least, and each further one to whoever is done with it first."""
    counts = [1] * len(speeds)
    for _ in range(micro_batches - len(speeds)):
        done = [(count + 1) / speed for count, speed in zip(counts, speeds, strict=True)]
        counts[done.index(min(done))] += 1
    return max(count * stage_s / speed for count, speed in zip(counts, speeds, strict=True))


def moved_of(costs: Costs, ranks: Sequence[Rank], found: Seats) -> int:
    cut, seats = found
    moved = 0
    for rank, stage in zip(ranks, seats, strict=True):
        if stage is not None:
            held = range(*rank.holds) if rank.holds else range(0)
            moved += sum(costs.layer_bytes[layer] for layer in range(cut[stage], cut[stage + 1]) if layer not in held)
    return moved


def seats_of(found: Partition, ranks: int) -> Seats:
    stage_of = {rank: number for number, stage in enumerate(found.stages) for rank in stage.ranks}
    cut = (*(stage.first for stage in found.stages), found.stages[-1].stop)
    return cut, tuple(stage_of.get(rank) for rank in range(ranks))


def check(found: Partition, costs: Costs, ranks: Sequence[Rank], stages: int, micro_batches: int) -> None:
    """What holds for every answer."""
    layers = [layer for stage in found.stages for layer in range(stage.first, stage.stop)]
    assert layers == list(range(costs.layers)) and all(stage.first < stage.stop for stage in found.stages)
    seated = [rank for stage in found.stages for rank in stage.ranks]
    assert sorted([*seated, *found.unseated]) == list(range(len(ranks)))
    assert len(found.stages) <= stages
    assert len(seated) == min(len(ranks), len(found.stages) * micro_batches)
    for stage in found.stages:
        assert list(stage.ranks) == sorted(stage.ranks) and len(stage.ranks) == len(stage.leaves)
        assert [leaf for run in stage.leaves for leaf in run] == list(range(micro_batches)) and all(stage.leaves)
    cut, seats = seats_of(found, len(ranks))
    assert fits(costs, ranks, cut, seats)
    assert found.moved_bytes == moved_of(costs, ranks, (cut, seats))
    times = [
        (sum(costs.layer_s[: stage.first]), len(run) * sum(costs.layer_s[stage.first : stage.stop]) / ranks[rank].speed)
        for stage in found.stages
        for rank, run in zip(stage.ranks, stage.leaves, strict=True)
    ]
    assert found.slowest_s == pytest.approx(max(time_s for _, time_s in times))
    if not found.unseated:  # else it is not said which speed most of those with a seat have
        usual = usual_speed(ranks)
        assert found.step_s == pytest.approx(max(before_s / usual + time_s for before_s, time_s in times))


# Cases


@st.composite
def costs_of(draw: st.DrawFn, most: int = 6) -> Costs:
    layers = draw(st.integers(1, most))
    return Costs(
        layer_s=tuple(
            draw(st.lists(st.sampled_from([0.1, 0.101, 0.2, 0.3, 1.0, 1.7]), min_size=layers, max_size=layers))
        ),
        layer_bytes=tuple(draw(st.lists(st.integers(0, 9), min_size=layers, max_size=layers))),
    )


def held(draw: st.DrawFn, layers: int) -> tuple[int, int] | None:
    first = draw(st.integers(0, layers))
    return (first, draw(st.integers(first + 1, layers))) if first < layers else None


@st.composite
def alike(draw: st.DrawFn, layers: int, most: int, memory: st.SearchStrategy[int | None]) -> list[Rank]:
    limit = draw(memory)
    speed = draw(st.sampled_from([1.0, 0.7]))
    holds = [held(draw, layers) for _ in range(draw(st.integers(1, 3)))]
    kinds = draw(st.lists(st.sampled_from(holds), min_size=1, max_size=most))
    return [Rank(speed=speed, memory_bytes=limit, holds=each) for each in kinds]


# Properties


@patient
@given(costs_of(), st.integers(1, 6), st.integers(1, 4), st.integers(1, 6))
def test_nothing_is_faster_for_ranks_of_one_speed(costs: Costs, count: int, stages: int, micro_batches: int) -> None:
    """By numbers of ranks, not by ranks: so up to the largest of the small sizes."""
    ranks = [Rank()] * count
    found = partition(costs, ranks, stages=stages, micro_batches=micro_batches)
    check(found, costs, ranks, stages, micro_batches)
    wanted = min(stages, count, costs.layers)
    assert len(found.stages) == wanted
    best_s = min(
        max(
            sum(costs.layer_s[:a]) + -(-micro_batches // each) * sum(costs.layer_s[a:b])
            for each, (a, b) in zip(counts, pairwise(cut), strict=True)
        )
        for inner in combinations(range(1, costs.layers), wanted - 1)
        for cut in [(0, *inner, costs.layers)]
        for counts in product(range(1, micro_batches + 1), repeat=wanted)
        if sum(counts) == min(count, wanted * micro_batches)
    )
    assert found.step_s == pytest.approx(best_s)


@patient
@given(costs_of(5), st.integers(1, 3), st.integers(1, 6), st.data())
def test_nothing_as_fast_moves_less_for_ranks_alike(
    costs: Costs, stages: int, micro_batches: int, data: st.DataObject
) -> None:
    ranks = data.draw(alike(costs.layers, 5, st.none() | st.integers(3, 30)))
    every = list(every_seating(costs, ranks, stages, micro_batches))
    if not every:
        with pytest.raises(DoesNotFit, match="memory"):
            partition(costs, ranks, stages=stages, micro_batches=micro_batches)
        return
    found = partition(costs, ranks, stages=stages, micro_batches=micro_batches)
    check(found, costs, ranks, stages, micro_batches)
    assert found == partition(costs, ranks, stages=stages, micro_batches=micro_batches)
    times = [step_of(costs, ranks, each, micro_batches) for each in every]
    best_s = min(times)
    assert found.step_s == pytest.approx(best_s)
    least = min(moved_of(costs, ranks, each) for each, s in zip(every, times, strict=True) if s <= best_s * (1 + 1e-9))
    assert found.moved_bytes == least


@patient
@given(costs_of(5), st.integers(1, 3), st.integers(1, 6), st.data())
def test_when_not_every_cut_is_tried_only_movement_may_be_more(
    costs: Costs, stages: int, micro_batches: int, data: st.DataObject
) -> None:
    ranks = data.draw(alike(costs.layers, 5, st.none()))
    best = partition(costs, ranks, stages=stages, micro_batches=micro_batches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(movement, "EVERY", 0)
        found = partition(costs, ranks, stages=stages, micro_batches=micro_batches)
    check(found, costs, ranks, stages, micro_batches)
    assert found.step_s == pytest.approx(best.step_s) or found.step_s < best.step_s
    assert found.moved_bytes >= best.moved_bytes


@patient
@given(costs_of(5), st.integers(1, 3), st.integers(1, 6), st.data())
def test_mixed_ranks_are_all_dealt_with(costs: Costs, stages: int, micro_batches: int, data: st.DataObject) -> None:
    """Whatever the speeds are; how good it is, only larger cases show."""
    speeds = st.sampled_from([1.0, 1.0, 1.0, 0.97, 0.7, 0.2, 3.0])
    limits = data.draw(st.sampled_from([[None], [None, 30], [25, 40]]))
    ranks = [
        Rank(speed=data.draw(speeds), memory_bytes=data.draw(st.sampled_from(limits)), holds=holds)
        for holds in data.draw(st.lists(st.sampled_from([None, (0, 1), (0, costs.layers)]), min_size=1, max_size=9))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "AFFORDABLE", 0)
        try:
            found = partition(costs, ranks, stages=stages, micro_batches=micro_batches)
        except DoesNotFit:
            assert limits != [None]
            return
    check(found, costs, ranks, stages, micro_batches)


@patient
@given(costs_of(5), st.integers(1, 3), st.integers(1, 6), st.sampled_from([0.05, 0.3, 1.0]), st.data())
def test_slack_saves_movement(costs: Costs, stages: int, micro_batches: int, slack: float, data: st.DataObject) -> None:
    ranks = data.draw(alike(costs.layers, 4, st.none()))
    found = partition(costs, ranks, stages=stages, micro_batches=micro_batches, slack=slack)
    check(found, costs, ranks, stages, micro_batches)
    every = list(every_seating(costs, ranks, stages, micro_batches))
    times = [step_of(costs, ranks, each, micro_batches) for each in every]
    assert found.step_s <= min(times) * (1 + slack) + 1e-6
    pairs = zip(every, times, strict=True)
    allowed = [moved_of(costs, ranks, each) for each, s in pairs if s <= min(times) * (1 + slack) - 1e-6]
    assert found.moved_bytes <= min(allowed, default=found.moved_bytes)


@patient
@given(costs_of(5), st.integers(1, 3), st.integers(1, 6), st.data())
def test_ranks_of_many_kinds_are_nearly_as_fast_as_can_be(
    costs: Costs, stages: int, micro_batches: int, data: st.DataObject
) -> None:
    speeds = data.draw(st.sampled_from([[1.0, 0.97, 0.7], [1.0, 0.5, 0.3], [1.0, 4.0]]))
    limits = data.draw(st.sampled_from([[None], [None, 8], [9, 20]]))
    ranks = [
        Rank(speed=data.draw(st.sampled_from(speeds)), memory_bytes=data.draw(st.sampled_from(limits)), holds=holds)
        for holds in data.draw(st.lists(st.sampled_from([None, (0, 1), (0, costs.layers)]), min_size=1, max_size=5))
    ]
    everybody = len(ranks) <= min(stages, len(ranks), costs.layers) * micro_batches
    every = list(every_seating(costs, ranks, stages, micro_batches)) if everybody else []
    try:
        found = partition(costs, ranks, stages=stages, micro_batches=micro_batches)
    except DoesNotFit:
        assert not every
        return
    check(found, costs, ranks, stages, micro_batches)
    if everybody:
        best_s = min(step_of(costs, ranks, each, micro_batches) for each in every)
        assert found.step_s <= best_s * (1 + SMALL_GAIN) ** 2 * 1.001 + 1e-6


@patient
@given(costs_of(), st.integers(1, 4), st.integers(1, 6), st.data())
def test_ranks_go_and_come_below_the_number_of_stages_and_above(
    costs: Costs, stages: int, micro_batches: int, data: st.DataObject
) -> None:
    ranks = [Rank(speed=data.draw(st.sampled_from([1.0, 1.0, 1.0, 0.6]))) for _ in range(data.draw(st.integers(1, 9)))]
    for _ in range(4):
        found = partition(costs, ranks, stages=stages, micro_batches=micro_batches)
        check(found, costs, ranks, stages, micro_batches)
        assert len(found.stages) == min(stages, len(ranks), costs.layers)
        if len({rank.speed for rank in ranks}) == 1:
            again = partition(costs, now(found, ranks), stages=stages, micro_batches=micro_batches)
            assert again.moved_bytes == 0 and again.step_s == found.step_s
        living = data.draw(st.sets(st.sampled_from(range(len(ranks))), min_size=1))
        after = now(found, ranks)
        ranks = [after[rank] for rank in sorted(living)] + [Rank()] * data.draw(st.integers(0, 6))


def now(found: Partition, ranks: Sequence[Rank]) -> list[Rank]:
    """Ranks that hold what they were given."""
    after = [replace(rank, holds=None) for rank in ranks]
    for stage in found.stages:
        for rank in stage.ranks:
            after[rank] = replace(after[rank], holds=(stage.first, stage.stop))
    return after
