"""Stages of layers in cases that can be followed by hand, what is said about them, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from resilient.core.chain import Costs, Rank, kinds_of
from resilient.core.partition import DoesNotFit, Partition, partition
from resilient.core.planner import SMALL_GAIN, lost_leaves

SIX = Costs(layer_s=(0.1, 0.1, 0.1, 0.1, 0.2, 0.2), layer_bytes=(100, 100, 100, 100, 200, 200))


def stages_of(found: Partition) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(stage.first, stage.stop, stage.ranks) for stage in found.stages]


def now(found: Partition, ranks: Sequence[Rank]) -> list[Rank]:
    after = list(ranks)
    for stage in found.stages:
        for rank in stage.ranks:
            after[rank] = replace(after[rank], holds=(stage.first, stage.stop))
    return after


# Cases


def test_layers_of_equal_weight_on_equal_ranks() -> None:
    found = partition(SIX, [Rank()] * 4, stages=2, micro_batches=8)
    assert stages_of(found) == [(0, 4, (0, 1)), (4, 6, (2, 3))]
    assert found.stages[0].leaves == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert found.slowest_s == pytest.approx(1.6)
    assert found.step_s == pytest.approx(2.0)
    assert found.moved_bytes == 4 * 400
    assert found.reason == (
        "4 ranks over 2 stages: layers 0-3 on 2 ranks, layers 4-5 on 2 ranks; the slowest stage takes 1.6 s of a step "
        "of 2 s; 1.6 KB of layers move"
    )


def test_a_later_stage_has_less_to_do_because_it_begins_later() -> None:
    costs = Costs(layer_s=(0.1,) * 12, layer_bytes=(1,) * 12)
    found = partition(costs, [Rank()] * 3, stages=3, micro_batches=2)
    assert [stage.stop for stage in found.stages] == [6, 10, 12]
    assert (found.slowest_s, found.step_s) == (pytest.approx(1.2), pytest.approx(1.4))
    found = partition(costs, [Rank(speed=0.5)] * 3, stages=3, micro_batches=32)
    assert [stage.stop for stage in found.stages] == [4, 8, 12]
    assert (found.slowest_s, found.step_s) == (pytest.approx(25.6), pytest.approx(27.2))


def test_a_lost_rank_moves_nothing_if_nothing_is_won_by_it() -> None:
    ranks = now(partition(SIX, [Rank()] * 4, stages=2, micro_batches=8), [Rank()] * 4)
    found = partition(SIX, ranks[:3], stages=2, micro_batches=8, slack=0.5)
    assert stages_of(found) == [(0, 4, (0, 1)), (4, 6, (2,))]
    assert found.moved_bytes == 0 and found.reason.endswith("no layer moves")


def test_a_lost_rank_moves_layers_if_the_step_becomes_shorter() -> None:
    ranks = now(partition(SIX, [Rank()] * 4, stages=2, micro_batches=8), [Rank()] * 4)
    found = partition(SIX, ranks[:3], stages=2, micro_batches=8)
    assert found.slowest_s == pytest.approx(2.4)
    assert stages_of(found) == [(0, 3, (0,)), (3, 6, (1, 2))] or stages_of(found) == [(0, 5, (0, 1)), (5, 6, (2,))]
    assert found.moved_bytes == 400


def test_a_joiner_goes_where_it_is_needed() -> None:
    costs = Costs(layer_s=(0.1, 0.3), layer_bytes=(1, 1))
    ranks = [Rank(holds=(0, 1)), Rank(holds=(1, 2)), Rank(), Rank()]
    found = partition(costs, ranks, stages=2, micro_batches=6)
    assert stages_of(found) == [(0, 1, (0,)), (1, 2, (1, 2, 3))]
    assert found.moved_bytes == 2


def test_a_slow_rank_has_fewer_micro_batches_and_stays_where_it_is() -> None:
    ranks = [Rank(holds=(0, 4))] * 2 + [Rank(holds=(4, 6)), Rank(holds=(4, 6), speed=0.5)]
    found = partition(SIX, ranks, stages=2, micro_batches=9, slack=0.3)
    assert stages_of(found) == [(0, 4, (0, 1)), (4, 6, (2, 3))]
    assert [len(run) for run in found.stages[1].leaves] == [6, 3]
    assert found.moved_bytes == 0


def test_fewer_ranks_than_stages() -> None:
    assert len(partition(SIX, [Rank()] * 2, stages=4, micro_batches=4).stages) == 2
    assert stages_of(partition(SIX, [Rank(holds=(2, 3))], stages=4, micro_batches=4)) == [(0, 6, (0,))]


def test_more_ranks_than_micro_batches() -> None:
    found = partition(SIX, [Rank()] * 5, stages=2, micro_batches=2)
    assert found.unseated == (4,)
    assert "1 rank unseated, for want of micro-batches" in found.reason
    slow = partition(SIX, [Rank(speed=0.5), *[Rank()] * 4], stages=2, micro_batches=2)
    assert slow.unseated == (0,)


def test_fewer_stages_are_taken_where_memory_is_known_to_be_enough() -> None:
    costs = Costs(layer_s=(0.1, 0.5), layer_bytes=(10, 10))
    assert len(partition(costs, [Rank()] * 2, stages=2, micro_batches=4).stages) == 2
    alone = partition(costs, [Rank(memory_bytes=20)] * 2, stages=2, micro_batches=4)
    assert len(alone.stages) == 1 and alone.slowest_s == pytest.approx(1.2)
    assert len(partition(costs, [Rank(memory_bytes=19)] * 2, stages=2, micro_batches=4).stages) == 2


def test_more_stages_than_fit_into_a_sentence() -> None:
    costs = Costs(layer_s=(0.1,) * 8, layer_bytes=(10**6,) * 8)
    reason = partition(costs, [Rank()] * 8, stages=8, micro_batches=4).reason
    assert reason.startswith("8 ranks over 8 stages: 1 layer on 1 rank each; ") and "8 MB of layers move" in reason


# Kinds


def test_speeds_that_differ_little_are_one_kind() -> None:
    ranks = [Rank(speed=speed) for speed in (1.0, 0.96, 0.7, 1.0, 0.69)]
    assert [(kind.ranks, kind.speed) for kind in kinds_of(ranks, range(5))] == [((0, 1, 3), 0.96), ((2, 4), 0.69)]


def large(speeds: Sequence[float]) -> tuple[Costs, list[Rank]]:
    costs = Costs(layer_s=tuple(0.01 + 0.001 * (at * 7 % 5) for at in range(100)), layer_bytes=(1000,) * 100)
    return costs, [Rank(speed=speed) for speed in speeds]


def test_few_slow_ranks_of_many_kinds_cost_hardly_more_than_their_absence() -> None:
    speeds = [1.0] * 396
    for at, speed in ((3, 0.8), (90, 0.7), (200, 0.6), (300, 0.5)):
        speeds.insert(at, speed)
    costs, ranks = large(speeds)
    found = partition(costs, ranks, stages=16, micro_batches=400)
    without = partition(costs, [rank for rank in ranks if rank.speed == 1.0], stages=16, micro_batches=400)
    assert sorted(rank for stage in found.stages for rank in stage.ranks) == list(range(400))
    assert found.slowest_s <= without.slowest_s * (1 + SMALL_GAIN)

    assert found.moved_bytes == sum(1000 * (stage.stop - stage.first) * len(stage.ranks) for stage in found.stages)


def test_ranks_of_all_speeds_come_near_to_what_all_could_do() -> None:
    costs, ranks = large([0.5 + (at * 37 % 101) / 100 for at in range(400)])
    found = partition(costs, ranks, stages=8, micro_batches=1600)
    ideal_s = 1600 * sum(costs.layer_s) / sum(rank.speed for rank in ranks)
    assert sorted(rank for stage in found.stages for rank in stage.ranks) == list(range(400))
    assert found.slowest_s <= ideal_s * 1.15


def test_many_cuts_move_nothing_without_need() -> None:
    costs, ranks = large([1.0] * 64)
    found = partition(costs, ranks, stages=16, micro_batches=64, slack=SMALL_GAIN)
    held = now(found, ranks)
    assert partition(costs, held, stages=16, micro_batches=64, slack=SMALL_GAIN).moved_bytes == 0
    busiest = max(found.stages, key=lambda stage: len(stage.ranks))
    assert len(busiest.ranks) > 1
    peers = [rank for at, rank in enumerate(held) if at != busiest.ranks[0]]
    after = partition(costs, [*peers, Rank()], stages=16, micro_batches=64, slack=SMALL_GAIN)
    assert after.moved_bytes <= 1000 * (busiest.stop - busiest.first)


# Refusals


@pytest.mark.parametrize(
    ("limits", "stages", "words"),
    [
        (
            [150] * 6,
            6,
            "layer 4 has 200 B, and no rank has more than 150 B .* give ranks more memory, or make two layers",
        ),
        ([50, 900, 900], 3, "rank 0 has 50 B .* the smallest layer has 100 B: give it more memory, or leave it out"),
        (
            [300] * 6,
            2,
            "6 layers of 800 B don't fit into 2 stages on 6 ranks, .* 300 B .*: allow more stages, add ranks",
        ),
    ],
)
def test_too_little_memory(limits: list[int], stages: int, words: str) -> None:
    with pytest.raises(DoesNotFit, match=words):
        partition(SIX, [Rank(memory_bytes=limit) for limit in limits], stages=stages, micro_batches=4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stages": 0}, "stages=0: there must be one"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"ranks": []}, "ranks=0"),
        ({"slack": 5.0}, "slack=5.0: give a fraction"),
        ({"ranks": [Rank(), Rank(holds=(5, 7))]}, r"holds=\(5, 7\) of rank 1: there are 6 layers"),
        ({"costs": Costs(layer_s=(1e12,), layer_bytes=(1,))}, "layer_s: 4 micro-batches would take 4e\\+12 s"),
    ],
)
def test_a_mistake_is_named(given: dict[str, Any], words: str) -> None:
    asked: dict[str, Any] = {"costs": SIX, "ranks": [Rank()] * 2, "stages": 2, "micro_batches": 4, **given}
    with pytest.raises(ValueError, match=words):
        partition(asked.pop("costs"), asked.pop("ranks"), **asked)


def test_mistakes_in_costs_and_ranks_are_named() -> None:
    with pytest.raises(ValueError, match=r"layer_s=\(0.1, 0\).* above zero"):
        Costs(layer_s=(0.1, 0), layer_bytes=(1, 1))
    with pytest.raises(ValueError, match=r"layer_bytes=\(1,\).* for each of 2 layers"):
        Costs(layer_s=(0.1, 0.1), layer_bytes=(1,))
    with pytest.raises(ValueError, match=r"speed=0\.0 of a rank"):
        Rank(speed=0.0)
    with pytest.raises(ValueError, match=r"holds=\(2, 2\) of a rank"):
        Rank(holds=(2, 2))


# Lost micro-batches of one stage


def test_survivors_of_a_stage_share_its_lost_leaves() -> None:
    assert lost_leaves({4: (0, 1), 7: (4, 5)}, 6) == {4: (0, 1, 2), 7: (3, 4, 5)}
    assert lost_leaves({9: (2,)}, 4) == {9: (0, 1, 2, 3)}
