"""The benchmark's computed times: a bound below the simulation, and both right where one knows them."""

from __future__ import annotations

import pytest

from benchmarks.pipeline_model import Layer, Split, best_s, bound_s, planned, simulated_s, splits

LAYER = Layer(forward_s=1.0, backward_s=2.0)


@pytest.mark.parametrize(
    ("split", "micro_batches", "wanted"),
    [
        (Split((4,), (1,)), 3, 36.0),
        (Split((4,), (3,)), 3, 12.0),
        (Split((2, 2), (1, 1)), 1, 12.0),
        (Split((2, 2), (1, 1)), 8, 54.0),  # 8 micro-batches of 6, and the other stage once
        (Split((1, 1, 1, 1), (1, 1, 1, 1)), 16, 57.0),
    ],
)
def test_even_pipelines_take_the_known_time(split: Split, micro_batches: int, wanted: float) -> None:
    assert simulated_s(split, micro_batches, LAYER) == pytest.approx(wanted)
    assert bound_s(split, micro_batches, LAYER) <= wanted


def test_no_simulated_step_is_shorter_than_the_bound() -> None:
    for ranks in range(1, 6):
        for stages in range(1, min(ranks, 4) + 1):
            for split in splits(6, ranks, stages):
                if max(split.ranks) <= 4:
                    assert simulated_s(split, 4, LAYER) >= bound_s(split, 4, LAYER) - 1e-9, split


def test_the_best_split_is_found() -> None:
    assert best_s(4, 2, range(1, 3), 8, LAYER, 4) == min(
        bound_s(Split((4,), (2,)), 8, LAYER), bound_s(Split((2, 2), (1, 1)), 8, LAYER)
    )


@pytest.mark.parametrize(("ranks", "stages"), [(3, 2), (6, 4), (7, 4)])
def test_ours_is_planned_as_well_as_any_split(ranks: int, stages: int) -> None:
    found = planned(12, ranks, stages, 32, LAYER)
    assert bound_s(found, 32, LAYER) == pytest.approx(best_s(12, ranks, range(stages, stages + 1), 32, LAYER, 12))


@pytest.mark.parametrize(("ranks", "stages"), [(3, 2), (7, 2), (6, 4), (7, 4), (11, 4), (13, 6)])
def test_uneven_stages_hardly_wait_for_each_other(ranks: int, stages: int) -> None:
    split = planned(16, ranks, stages, 64, LAYER)
    assert bound_s(split, 64, LAYER) >= 0.92 * simulated_s(split, 64, LAYER)


@pytest.mark.parametrize(("layers", "ranks", "micro_batches"), [((6, 5, 5), 2, 32), ((2, 3, 3, 3, 3, 2), 1, 64)])
def test_a_longest_stage_waits_for_nobody(layers: tuple[int, ...], ranks: int, micro_batches: int) -> None:
    split = Split(layers, (ranks,) * len(layers))
    assert simulated_s(split, micro_batches, LAYER) == pytest.approx(bound_s(split, micro_batches, LAYER))


def test_messages_cost_time() -> None:
    split = Split((2, 2), (1, 1))
    assert simulated_s(split, 2, LAYER, message_s=0.5) > simulated_s(split, 2, LAYER)
