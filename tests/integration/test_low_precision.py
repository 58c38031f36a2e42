"""Models in low precision over real processes: the same bits for any number of ranks, and in every layout."""

from __future__ import annotations

import pytest

import resilient
from tests import crew
from tests.low_precision import flat, pipeline


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_comes_to_the_same_bits(ranks: int) -> None:
    end = crew.run(flat, workers=(ranks, ranks)).end
    assert end is not None and end.outcome == "finished", end
    assert end.digest == resilient.train(name="alone")(flat).local().digest


@pytest.mark.parametrize(("stages", "ranks"), [(2, 3), (3, 3)])
def test_every_layout_comes_to_the_same_bits(stages: int, ranks: int) -> None:
    end = crew.run(pipeline, stages, workers=(ranks, ranks)).end
    assert end is not None and end.outcome == "finished", end
    assert end.digest == resilient.train(name="alone", workers=1)(pipeline).local(1).digest
