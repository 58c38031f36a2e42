"""A rank dies, at every point of a step; the result has the same bits as one process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.loops import fault, train

STEPS = 8


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    return train("alone").local(steps=STEPS)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
def test_any_number_of_workers_gives_the_same_bits(cluster: Any, undisturbed: Any, workers: int) -> None:
    result = train(f"workers-{workers}", workers=workers)(steps=STEPS)
    assert result.digest == undisturbed.digest
    assert result.metrics == undisturbed.metrics
    assert result.step == STEPS and not result.recoveries


@pytest.mark.parametrize("phase", ["forward", "backward", "reduce", "reduced", "stepped"])
def test_killed_at_any_phase(cluster: Any, undisturbed: Any, tmp_path: Path, phase: str) -> None:
    result = train(f"killed-{phase}", workers=(2, 3))(steps=STEPS, faults=(fault(tmp_path, 1, 3, phase),))
    assert result.digest == undisturbed.digest
    assert [row["loss"] for row in result.metrics] == [row["loss"] for row in undisturbed.metrics]
    assert result.recoveries[0]["kind"] == "rank lost"
