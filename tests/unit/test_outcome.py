"""What ranks of different stages know of a step, brought together by a minimum."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from resilient.core.outcome import Outcome

values = st.lists(st.one_of(st.none(), st.floats(allow_nan=False)), min_size=3, max_size=3)


@given(values, values, st.booleans())
def test_the_minimum_is_what_anybody_knows(losses: list[float | None], norms: list[float | None], finite: bool) -> None:
    last = Outcome(losses=tuple(losses), norms=(None,) * 3, finite=finite)
    first = Outcome(losses=(None,) * 3, norms=tuple(norms))
    low = [min(pair) for pair in zip(last.row(), first.row(), strict=True)]
    found = Outcome.of(low, 3)
    assert (found.losses, found.norms, found.finite) == (tuple(losses), tuple(norms), finite)
    assert [math.copysign(1, x) for x in found.losses if x == 0] == [math.copysign(1, x) for x in losses if x == 0]


def test_a_loss_that_is_no_number_is_not_nothing() -> None:
    found = Outcome.of(Outcome(losses=(float("nan"), None), norms=()).row(), 2)
    assert found.losses[0] is not None and math.isnan(found.losses[0])
    assert found.losses[1] is None
