"""How a run ends, without a cluster: in which order things are ended, and who is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from resilient.controller import Controller
from resilient.core.instructions import End
from resilient.ending import Ending


def ending(**parts: Any) -> Ending:
    """Of a run without snapshots and checkpoints, with only these `parts` of a controller around it."""
    nobody: Any = SimpleNamespace()
    found: dict[str, Any] = {
        "job": SimpleNamespace(settings=SimpleNamespace(checkpoint=None, snapshot=None)),
        "me": nobody,
        "lock": threading.Lock(),
        "driver": SimpleNamespace(expired=lambda: False),
        "control": nobody,
        "ledger": nobody,
        "errands": nobody,
        "workers": nobody,
        "showing": nobody,
        "told": nobody,
        "happened": lambda happening: None,
    }
    return Ending(**(found | parts))


class Shell:
    """What the end has around it, which notes what is asked of it."""

    def __init__(self, awaited: list[bool]) -> None:
        self.asked: list[str] = []
        self._awaited = awaited

    def of(self, outcome: str) -> tuple[Controller, Ending]:
        """A controller whose run has ended so, which its driver knows."""
        controller: Any = object.__new__(Controller)
        workers = SimpleNamespace(close=lambda: self)
        controller._ending = ending(me=self, ledger=self, errands=self, workers=workers, showing=self)
        controller._ending.outcome = End(outcome=outcome, reason="")  # type: ignore[arg-type]
        controller._ending._ended_at = 1.0
        controller.close()
        return controller, controller._ending

    def end(self, *, linger: bool | None = None) -> None:
        self.asked.append("showing ends" if linger is None else "workers end")

    def conclude(self, *, superseded: bool) -> None:
        self.asked.append("conclude")

    def close(self, *, keep_lineage: bool) -> None:
        self.asked.append("records are closed")

    def is_awaited(self, ended_at: float) -> bool:
        self.asked.append("awaited?")
        return self._awaited.pop(0)

    def run(self, work: Callable[[], Any]) -> None:
        work()


@pytest.mark.parametrize("scrapes", [0, 2])
def test_all_of_the_run_is_over_before_it_only_waits_to_be_scraped(
    monkeypatch: pytest.MonkeyPatch, scrapes: int
) -> None:
    monkeypatch.setattr("resilient.ending.launch.end", lambda shell: shell.asked.append("gone"))
    monkeypatch.setattr("resilient.ending.LOOK_EVERY_S", 0.0)
    shell = Shell([True] * scrapes + [False])
    controller, ending = shell.of("finished")
    ending._clean_up()
    assert shell.asked[:3] == ["workers end", "conclude", "records are closed"]
    assert shell.asked[-2:] == ["showing ends", "gone"]
    assert controller.lingers() == bool(scrapes)
    assert shell.asked[3:-2] == ["awaited?"] * (scrapes + 1)


def test_a_new_run_is_given_way_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient.ending.launch.end", lambda shell: shell.asked.append("gone"))
    shell = Shell([True] * 3)
    controller, ending = shell.of("finished")
    assert not controller.gives_way(), "it is not over yet"
    monkeypatch.setattr("resilient.ending.time.sleep", lambda _: controller.gives_way())
    ending._clean_up()
    assert shell.asked[-3:] == ["awaited?", "showing ends", "gone"]


def test_another_controller_rules_then_nothing_is_closed_and_nobody_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient.ending.launch.end", lambda shell: shell.asked.append("gone"))
    shell = Shell([True])
    _, ending = shell.of("superseded")
    ending._clean_up()
    assert shell.asked == ["conclude", "showing ends", "gone"]
