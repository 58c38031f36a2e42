"""What the page is told: all at first, then what is new; and what the run is doing, in words."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from resilient.core.figures import Figures
from resilient.feed import MOST_HAPPENINGS, Feed, finite, state_of
from resilient.metrics import Seen
from tests.unit.test_metrics import BEFORE_ANYTHING

LOOK = {**BEFORE_ANYTHING, "outcome": None, "recovering": None, "formed": 0}


def feed(**look: Any) -> Feed:
    return Feed(lambda: Seen(figures=Figures(), look={**LOOK, **look}))


def test_first_all_then_what_is_new() -> None:
    shown = feed()
    for step in range(3):
        shown.loss(step, 1.0)
    shown.happened({"kind": "run began"})
    shown.happened({"kind": "recovery ended"})
    found, mark = shown.history(None)
    assert found["anew"] and [step for step, _ in found["losses"]["points"]] == [0, 1, 2]
    assert len(found["happenings"]) == 2 and len(found["recoveries"]) == 1
    shown.loss(3, 2.0)
    shown.happened({"kind": "run ended"})
    found, mark = shown.history(mark)
    assert not found["anew"] and found["losses"]["points"] == [(3, 2.0)] and found["losses"]["newest"] == (3, 2.0)
    assert found["happenings"] == [{"kind": "run ended"}] and found["recoveries"] == []
    shown.back_to(1)
    found, _ = shown.history(mark)
    assert found["losses"]["anew"] and found["losses"]["points"] == [(0, 1.0)] and not found["happenings"]


def test_it_remembers_so_much_and_no_more() -> None:
    shown = feed()
    _, mark = shown.history(None)
    for number in range(3 * MOST_HAPPENINGS):
        shown.happened({"kind": "node seen", "number": number})
    found, _ = shown.history(mark)
    assert len(found["happenings"]) == MOST_HAPPENINGS
    assert found["happenings"][-1]["number"] == 3 * MOST_HAPPENINGS - 1


def test_all_of_it_is_json_whatever_a_loss_is() -> None:
    shown = feed(loss=math.nan, wanted={"min": 1, "max": 2, "spares": math.inf})
    shown.loss(0, math.nan)
    json.dumps([shown.now(), shown.history(None)[0]], allow_nan=False)
    assert shown.now()["loss"] is None
    assert finite({1: {3, 1}, "a": (math.inf, True, object)})["1"] == [1, 3]


RECOVERING = {"kind": "rank lost", "reason": "lost rank 1", "generation": 0}


@pytest.mark.parametrize(
    ("look", "state"),
    [
        ({}, "starting"),
        ({"step": 4}, "training"),
        ({"step": 4, "recovering": {**RECOVERING, "kind": "joined"}}, "training"),
        ({"step": 4, "recovering": RECOVERING}, "recovering: deciding"),
        ({"recovering": {**RECOVERING, "generation": 3}, "generation": 3, "formed": 2}, "recovering: forming"),
        ({"recovering": {**RECOVERING, "generation": 3}, "generation": 3, "formed": 3}, "recovering: computing again"),
        ({"recovering": {**RECOVERING, "generation": 2}, "generation": 3, "formed": 1}, "recovering: deciding"),
        ({"recovering": RECOVERING, "waiting_s": 1.0}, "waiting for nodes"),
        ({"waiting_s": 1.0, "outcome": {"outcome": "failed", "reason": "no nodes"}}, "failed"),
    ],
)
def test_what_the_run_is_doing(look: dict[str, Any], state: str) -> None:
    assert state_of({**LOOK, **look})[0] == state
