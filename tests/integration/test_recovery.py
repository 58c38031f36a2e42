"""Ranks die, at every point of a step; the result has the same bits as one process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.loops import fault, train

STEPS = 12


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    return train("alone").local(steps=STEPS)


def losses(result: Any) -> list[float]:
    return [row["loss"] for row in result.metrics]


@pytest.mark.parametrize("workers", [2, *(pytest.param(number, marks=pytest.mark.long) for number in (1, 3, 4, 5))])
def test_any_number_of_workers_gives_the_same_bits(cluster: Any, undisturbed: Any, workers: int) -> None:
    result = train(f"workers-{workers}", workers=workers)(steps=STEPS)
    assert result.digest == undisturbed.digest
    assert result.metrics == undisturbed.metrics
    assert result.step == STEPS and not result.recoveries


def test_deaths_at_every_phase_of_a_step_down_to_one_rank(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Six ranks lose one in forward, in backward, while reducing, before and after optimizer.step; two are
    rank 0. DataLoader workers are in use."""
    points = [(1, 2, "forward"), (2, 4, "reduce"), (0, 6, "backward"), (1, 8, "reduced"), (0, 9, "stepped")]
    faults = tuple(fault(tmp_path, *point) for point in points)
    result = train("every-phase", workers=(1, 6))(steps=STEPS, faults=faults, workers=1)
    assert result.digest == undisturbed.digest
    assert losses(result) == losses(undisturbed)
    assert sum(len(item["lost"]) for item in result.recoveries) == len(points)


@pytest.mark.long
def test_two_deaths_at_once_and_one_during_the_recovery(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Two of five die in the same exchange; of the rest, the rank whose store the next plan names dies
    while that generation forms."""
    faults = (fault(tmp_path, 1, 4, "reduce"), fault(tmp_path, 2, 4, "reduce"), fault(tmp_path, 0, 4, "unplanned"))
    result = train("two-and-one", workers=(2, 5))(steps=STEPS, faults=faults)
    assert result.digest == undisturbed.digest
    assert losses(result) == losses(undisturbed)
    assert sum(len(item["lost"]) for item in result.recoveries) == len(faults)


def test_uneven_splits_and_many_micro_batches(cluster: Any, tmp_path: Path) -> None:
    """Eleven micro-batches over three ranks, then two."""
    size = {"global_batch": 33, "micro_batch": 3, "steps": 6}
    alone = train("uneven-alone").local(**size)
    result = train("uneven", workers=(1, 3))(faults=(fault(tmp_path, 1, 3, "backward"),), **size)
    assert result.digest == alone.digest and losses(result) == losses(alone)
    assert [item["ranks"] for item in result.recoveries][:1] == [2]


def test_a_finished_the_exchange_then_c_dies_then_a_dies_while_serving_b(
    cluster: Any, undisturbed: Any, tmp_path: Path
) -> None:
    """C's last bytes reach A and not B, and C dies; A has applied the step and dies while sending B the
    kept result. B alone computes all lost micro-batches again, of this very step."""
    faults = (fault(tmp_path, 2, 5, "sent to rank 0 only"), fault(tmp_path, 0, 5, "serving"))
    result = train("a-b-c", workers=(1, 3))(steps=STEPS, faults=faults)
    assert result.digest == undisturbed.digest
    assert losses(result) == losses(undisturbed)
    assert sum(len(item["lost"]) for item in result.recoveries) == 2


@pytest.mark.long
def test_a_laggard_is_caught_up_from_the_kept_result(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    result = train("laggard", workers=(1, 3))(steps=STEPS, faults=(fault(tmp_path, 2, 5, "sent to rank 0 only"),))
    assert result.digest == undisturbed.digest
    assert losses(result) == losses(undisturbed)


@pytest.mark.long
def test_the_fast_reduction_survives_a_death_too(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Without the bits: ranks still agree with each other (the run fails if not), and nearly with one alone."""
    run = train("fast", workers=(1, 3), reduction="fast")
    result = run(steps=STEPS, faults=(fault(tmp_path, 1, 3, "reduced"),))
    assert result.step == STEPS and result.recoveries[0]["kind"] == "rank lost"
    assert losses(result)[0] == pytest.approx(losses(undisturbed)[0], rel=1e-5)
