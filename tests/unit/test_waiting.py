"""A run that waits for nodes says what it lacks, at once and wherever its output goes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import folders, keeper, launch
from actors.keeper import Keeper, KeeperSpec, NotBegun
from resilient.core.control import Control
from resilient.core.events import NodeSeen, NoNodeFits, Tick
from resilient.core.instructions import End, Say
from resilient.core.limits import Limits
from resilient.presence import Presence
from resilient.progress import on_terminal
from resilient.told import Told
from tests.jobs import job

CPU_NODE = {"Alive": True, "NodeID": "a", "Resources": {"CPU": 4.0}}
GPU_NODE = {"Alive": True, "NodeID": "b", "Resources": {"CPU": 1.0, "GPU": 2.0}}
DEAD_NODE = {"Alive": False, "NodeID": "c", "Resources": {"nosuch": 9.0}}


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"CPU": 2, "nosuch": 1}, "each rank: nosuch: 1 (the most that one has is 0)"),
        ({"GPU": 4}, "GPU: 4 (the most that one has is 2)"),
        ({"CPU": 3, "GPU": 1}, "no node has all that resources= asks for each rank: {'CPU': 3, 'GPU': 1}"),
    ],
)
def test_what_no_node_has_is_named(monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], said: str) -> None:
    monkeypatch.setattr(launch.ray, "nodes", lambda: [CPU_NODE, GPU_NODE, DEAD_NODE])
    assert said in launch.lacking(resources)


def test_nothing_is_lacking_where_a_node_could_hold_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.ray, "nodes", lambda: [CPU_NODE, GPU_NODE])
    assert launch.lacking({"CPU": 4}) == launch.lacking({"CPU": 1, "GPU": 2}) == ""
    monkeypatch.setattr(launch.ray, "nodes", lambda: [])
    assert launch.lacking({"CPU": 4}) == "", "nodes may be coming"


def texts(instructions: tuple[object, ...]) -> list[str]:
    return [each.text for each in instructions if isinstance(each, Say)]


def test_it_is_said_at_once_and_when_the_run_gives_up() -> None:
    control = Control(limits=Limits(min_workers=1, max_workers=1, wait_for_nodes_s=60))
    control.handle(Tick(), 0.0)
    (said,) = texts(control.handle(NoNodeFits(why="no node has nosuch"), 1.0))
    assert said.startswith("waiting for nodes: 0 of at least 1 workers are ready; no node has nosuch; gives up")
    assert control.waits and "no node has nosuch" in control.waiting_for
    assert not texts(control.handle(Tick(), 59.0))
    (end,) = (each for each in control.handle(Tick(), 60.0) if isinstance(each, End))
    assert "no node has nosuch" in end.reason


def test_a_node_that_comes_is_used_all_the_same() -> None:
    control = Control(limits=Limits(min_workers=1, max_workers=1))
    control.handle(NoNodeFits(why="no node has nosuch"), 0.0)
    control.handle(NoNodeFits(why=""), 1.0)
    control.handle(NodeSeen(node="a", capacity=1), 1.0)
    assert not control.waits and control.membership.alive()


# A keeper that cannot begin


def presence(control: Any, said: list[str], handled: list[Any]) -> Presence:
    nobody: Any = SimpleNamespace()
    workers: Any = SimpleNamespace(is_present=lambda node, incarnation: incarnation == 5)
    told: Any = SimpleNamespace(say=said.append)
    more = dict.fromkeys(("job", "detector", "departures", "protection", "ending", "occupancy"), nobody)
    return Presence(control=control, workers=workers, told=told, handle=handled.append, **more)


def test_why_a_keeper_could_not_begin_is_said_and_ends_a_run_that_has_no_other_node() -> None:
    said: list[str] = []
    handled: list[Any] = []
    found = presence(Control(limits=Limits(min_workers=1, max_workers=1)), said, handled)
    found.nodes_alive = {"a", "b"}
    found.could_not_begin(NotBegun(node="b", incarnation=4, why="that was an earlier one"))
    assert not said
    found.could_not_begin(NotBegun(node="a", incarnation=5, why="no folder"))
    assert said == ["the keeper of node a could not begin: no folder"] and not handled
    found.could_not_begin(NotBegun(node="b", incarnation=5, why="no folder"))
    (event,) = handled
    assert event.hopeless and "no folder; so it is on every node (2)" in event.why


def test_a_run_without_hope_ends_at_once() -> None:
    control = Control(limits=Limits(min_workers=1, max_workers=1))
    (end,) = (each for each in control.handle(NoNodeFits(why="no folder", hopeless=True), 0.0) if isinstance(each, End))
    assert (end.outcome, end.reason) == ("failed", "no folder")


def test_a_keeper_tells_why_it_cannot_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Any] = []
    monkeypatch.setattr(keeper, "raise_priority", lambda: None)
    monkeypatch.setattr(keeper, "Notice", lambda then: None)
    monkeypatch.setattr(keeper.ray, "get", lambda answer, timeout: None)
    (tmp_path / "file").touch()
    spec = KeeperSpec(
        key="gpt/1", node="n", folder=f"{tmp_path}/file/x/y", secret="s", incarnation=7, beat_s=1.0, lease_s=1.0
    )
    controller: Any = SimpleNamespace(hear=SimpleNamespace(remote=told.extend))
    with pytest.raises(OSError, match="can't be made"):
        Keeper(spec, controller)
    ((why),) = (each.why for each in told if (each.node, each.incarnation) == ("n", 7))
    assert "Not a directory" in why and "Snapshot(directory=...) is a folder in memory" in why


def test_a_folder_that_can_be_made_is(tmp_path: Path) -> None:
    folders.own(tmp_path / "a" / "b", 0.0)
    assert (tmp_path / "a" / "b" / folders.OWNER).exists()


# What the driver shows


def news(for_s: float | None) -> dict[str, Any]:
    waiting = None if for_s is None else {"for_s": for_s, "why": "1 of at least 2 workers are ready"}
    return {"messages": [], "waiting": waiting}


def test_without_a_terminal_waiting_is_said_at_growing_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    with on_terminal("gpt") as tell:
        for second in range(100):
            tell(news(float(second)))
        tell(news(None))
        tell(news(3.0))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "gpt: waiting for nodes for 3 s: 1 of at least 2 workers are ready"
    assert [line.split(":")[1] for line in said] == [
        f" waiting for nodes for {seconds} s" for seconds in (3, 10, 20, 40, 80, 3)
    ]


def test_the_driver_is_told() -> None:
    control = Control(limits=Limits(min_workers=2, max_workers=2))
    control.handle(Tick(), 0.0)
    control.handle(Tick(), 4.0)
    told = Told(job=job("gpt"), control=control)
    assert told._waiting() == {"for_s": 4.0, "why": "0 of at least 2 workers are ready"}
