"""What a run says of itself: how many steps it is to have, and what has become of its ranks."""

from __future__ import annotations

import pytest

from resilient.core.control import Control
from resilient.core.detector import Detector, Vital
from resilient.core.events import NodeSeen, RankGone, RankReady
from resilient.core.limits import Limits
from resilient.core.plan import Address
from resilient.core.view import step_of, view
from resilient.told import Told
from tests.unit.test_control import Scenario
from tests.unit.test_showing import job


@pytest.fixture
def control() -> Control:
    """With a rank that has been started, and a place for another one."""
    found = Control(limits=Limits(min_workers=1, max_workers=1))
    found.handle(NodeSeen(node="a", capacity=2), 0.0)
    return found


def ready(steps: int | None) -> RankReady:
    address = Address(host="h", port=1)
    more = {"micro_batches": 4, "probe": "same", "probe_fields": ""}
    return RankReady(member=1, node="a", address=address, steps=steps, **more)  # type: ignore[arg-type]


def test_how_many_steps_there_are_is_known_from_when_a_rank_has_said_so(control: Control) -> None:
    told = Told(job=job(None), control=control)
    assert told.steps is None
    control.handle(ready(1000), 1.0)
    assert told.steps == 1000
    control.handle(RankGone(member=1, why="killed"), 2.0)
    assert told.steps == 1000, "whoever comes next does the same"


def test_the_end_of_a_stream_is_not_known(control: Control) -> None:
    control.handle(ready(None), 1.0)
    assert Told(job=job(None), control=control).steps is None
    assert (step_of({"step": 7, "steps": None}), step_of({"step": 7, "steps": 9})) == ("step 7", "step 7 of 9")


def test_after_the_end_no_process_is_there_any_more(control: Control) -> None:
    control.handle(ready(9), 1.0)
    detector = Detector(detection_s=1.0)
    assert {each["state"] for each in states(control, detector)} == {"ready"}
    control.ended = True
    assert {each["state"] for each in states(control, detector)} == {"ended"}


def test_what_ranks_do_is_what_their_keepers_saw_last() -> None:
    run, detector = Scenario().begun(), Detector(detection_s=1.0)
    assert [each["state"] for each in states(run.control, detector)] == ["unknown", "unknown"]
    vitals = (
        Vital(member=1, alive=True, stopped=False, activity="computing", work=0, longest_s=0.0),
        Vital(member=2, alive=True, stopped=False, activity="waiting", work=0, longest_s=0.0),
    )
    detector.beat("a", vitals, 1.0)
    assert [each["state"] for each in states(run.control, detector)] == ["computing", "waiting"]


def states(control: Control, detector: Detector) -> list[dict[str, str]]:
    seen = view(control, detector)
    return [*seen["ranks"], *seen["others"]]
