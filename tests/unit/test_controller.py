"""The controller's shell, without a cluster: what it still does when it rules no longer."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest

from actors.remark import Remark
from resilient.controller import Controller
from resilient.core.control import Control
from resilient.core.events import NodeSeen
from resilient.core.instructions import End, Kill, Spawn
from resilient.core.limits import Limits
from resilient.core.occupancy import Occupancy
from resilient.core.story import Story
from resilient.ending import Ending
from resilient.presence import Nodes, Presence
from tests.unit.test_ending import ending


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    """One that has nobody to talk to."""
    found = object.__new__(Controller)
    shell: Any = found
    control: Any = Control(limits=Limits(min_workers=1, max_workers=2))
    nobody: Any = SimpleNamespace()
    shell._control = control
    shell._story, shell._showing = Story(), SimpleNamespace(happened=lambda happening, step: None)
    shell._told = SimpleNamespace(records=SimpleNamespace(newest=-1))
    shell._ending = ending(control=control, happened=shell._happened)
    shell._presence = Presence(
        job=nobody,
        control=control,
        detector=nobody,
        workers=nobody,
        departures=nobody,
        protection=nobody,
        ending=shell._ending,
        told=nobody,
        handle=shell._handle,
        occupancy=Occupancy(patience_s=10.0),
    )
    monkeypatch.setattr(Ending, "_clean_up", lambda self: None)
    return found


def test_one_that_lost_its_rule_over_a_rank_decides_nothing_more(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out: list[object] = []
    monkeypatch.setattr(Controller, "_carry_out", lambda self, instruction: carried_out.append(instruction))
    controller._handle(NodeSeen(node="a", capacity=1))
    assert [type(item) for item in carried_out if not isinstance(item, End)].count(Spawn) == 1
    carried_out.clear()
    controller._ending.end(End(outcome="superseded", reason="member 1 was started by another controller"))
    controller._handle(NodeSeen(node="b", capacity=1))
    controller._presence.listed(Nodes({"c": 1}, {"c": 1}, set(), {}), 0.0)
    assert not carried_out


@pytest.mark.parametrize("another_rules", [False, True])
def test_a_rank_is_released_only_while_no_other_controller_has_made_a_newer_generation(
    controller: Controller, monkeypatch: pytest.MonkeyPatch, another_rules: bool
) -> None:
    """It may have a seat there."""
    shell: Any = controller
    killed: list[tuple[int, str]] = []
    shell._errands = SimpleNamespace(run=lambda work, then: then(work()))
    shell._ledger = SimpleNamespace(has_generation=lambda number: another_rules and number == 1)
    shell._told.say = lambda text: None
    shell._occupancy = Occupancy(patience_s=10.0)
    shell._detector = SimpleNamespace(forget_rank=lambda member: None)
    shell._workers = SimpleNamespace(kill=lambda member, node: killed.append((member, node)))
    ended: list[str] = []
    monkeypatch.setattr(Ending, "end", lambda self, end: ended.append(end.outcome))
    controller._carry_out(Kill(member=4, node="a", reason="nobody needs it any more", released=True))
    assert (killed, ended) == (([], ["superseded"]) if another_rules else ([(4, "a")], []))


def test_a_message_of_an_unknown_kind_is_refused_where_it_comes_in_and_said(controller: Controller) -> None:
    shell: Any = controller
    shell._events = queue.Queue()
    controller.hear((NodeSeen(node="a", capacity=1), "what is this?", SimpleNamespace(kind="odd")))
    heard = [shell._events.get_nowait() for _ in range(3)]
    assert heard[0] == NodeSeen(node="a", capacity=1)
    assert [(type(each), "str" in each.text) for each in heard[1:]] == [(Remark, True), (Remark, False)]
