"""Keepers that are let go while others take their place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from resilient.departures import Departures
from tests.unit.test_workers import AtOnce


def test_a_keeper_that_takes_the_place_of_one_that_was_saving_saves_too() -> None:
    """It starts by an errand: it is not there yet when its node is to be let go once more."""
    asked: list[str] = []

    def keeper(name: str) -> Any:
        return SimpleNamespace(finish_saving=SimpleNamespace(remote=lambda: asked.append(name)))

    workers: Any = SimpleNamespace(keepers={"n": keeper("first")})
    errands: Any = AtOnce()
    forgotten: list[str] = []
    departures = Departures(
        SimpleNamespace(),  # type: ignore[arg-type]
        workers,
        errands,
        saves=True,
        put=lambda event: None,
        forget=forgotten.append,
    )
    departures.let_go("n")
    del workers.keepers["n"]
    errands.held = []
    errands.run(lambda: keeper("second"), lambda started: workers.keepers.update(n=started))
    departures.replaced("n")
    errands.go_on()
    assert asked == ["first", "second"] and not forgotten
