"""Pipelines over real processes: the same bits however layers and micro-batches are spread, and whoever dies."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import resilient
from resilient.core.seat import SeatReport
from tests import crew
from tests.pipelines import GLOBAL_BATCH, MICRO_BATCH, Death, train

STEPS = 8
MICRO_BATCHES = GLOBAL_BATCH // MICRO_BATCH


@functools.cache
def alone(stages: int = 1, steps: int = STEPS) -> resilient.Result:
    """The reference. The number of stages plays no part."""
    return resilient.train(workers=1, name="alone")(train).local(stages, steps)


def check(found: crew.Crew, reference: resilient.Result) -> None:
    assert found.end is not None and found.end.outcome == "finished", found.end
    assert found.end.digest == reference.digest
    for losses in found.values.values():
        seen = reference.value[len(reference.value) - len(losses) :]  # a replacement has only the last ones
        assert losses == seen, "a loss that no rank should have seen"


@pytest.mark.parametrize(
    ("stages", "ranks"),
    [
        (2, 3),
        *(
            pytest.param(*layout, marks=pytest.mark.long)
            for layout in ((1, 3), (2, 2), (2, 5), (3, 3), (3, 5), (4, 4), (5, 6))
        ),
    ],
)
def test_every_layout_comes_to_the_same_bits(stages: int, ranks: int) -> None:
    found = crew.run(train, stages, STEPS, workers=(ranks, ranks))
    check(found, alone())
    (plan,) = found.plans
    assert len(plan.stages) == stages and plan.size == ranks
    check_bubbles(found, stages, ranks)


def check_bubbles(found: crew.Crew, stages: int, ranks: int) -> None:
    """All steps of all ranks are in it."""
    assert [row["stage"] for row in found.bubbles] == list(range(stages))
    assert sum(row["rank_steps"] for row in found.bubbles) == STEPS * ranks
    for row in found.bubbles:
        assert sum(row["ranks"]) == ranks and row["rank_steps"] == STEPS * row["ranks"][row["stage"]]
        assert 0.0 <= row["idle"] < 1.0
        even = len(set(row["ranks"])) == 1 and MICRO_BATCHES % row["ranks"][0] == 0
        micro_batches = MICRO_BATCHES // row["ranks"][0]
        assert row["by_schedule"] == ((stages - 1) / (micro_batches + stages - 1) if even else None)


@pytest.mark.parametrize(
    ("checkpoint", "schedule"), [(True, "1f1b"), pytest.param(False, "gpipe", marks=pytest.mark.long)]
)
def test_neither_schedule_nor_checkpointing_changes_a_bit(checkpoint: bool, schedule: str) -> None:
    found = crew.run(train, 2, STEPS, None, checkpoint, schedule, workers=(3, 3))
    check(found, alone())


@pytest.mark.parametrize(
    ("phase", "place"),
    [
        ("backward", 0),
        *(
            pytest.param(phase, place, marks=pytest.mark.long)
            for phase in ("forward", "backward", "reduced", "stepped")
            for place in (0, -1)
            if (phase, place) != ("backward", 0)
        ),
    ],
)
def test_a_rank_dies_whose_layers_another_has(phase: str, place: int, tmp_path: Path) -> None:
    """Its micro-batches are dealt to that one; what had been sent to it is sent again."""
    first = crew.run(train, 2, 2, workers=(4, 4)).plans[0]
    widest = max(first.stages, key=lambda stage: len(stage.ranks))
    assert len(widest.ranks) > 1
    victim = first.members[widest.ranks[place]]
    found = crew.run(train, 2, STEPS, Death(phase, victim, 2, tmp_path / "dead"), workers=(2, 4), room=4)
    assert (tmp_path / "dead").exists()
    assert [plan.kind for plan in found.plans[:2]] == ["initial", "unplanned"]
    check(found, alone())


@pytest.mark.long
def test_ranks_leave_one_by_one_until_one_is_left() -> None:
    """Layers are handed over, and there are fewer stages in the end than were asked for."""
    left: list[int] = []

    def leave(report: SeatReport, hand: crew.Hand) -> None:
        if hand.plan is None or report.member not in hand.plan.ranks or report.member in left:
            return
        if len(left) < 3 and report.step >= 8 * (len(left) + 1):
            left.append(report.member)
            hand.room(4 - len(left))
            hand.ask_to_leave(report.member)

    steps = 40
    found = crew.run(train, 3, steps, workers=(1, 4), room=4, on_report=leave)
    check(found, alone(steps=steps))
    assert found.plans[0].size == 4 and found.plans[-1].size == 1
    assert all(plan.kind != "unplanned" for plan in found.plans), "nothing is aborted"
