"""A run in a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from resilient.core.figures import Figures
from resilient.core.spent import Spent
from resilient.core.story import Happening
from resilient.feed import Feed
from resilient.metrics import Seen
from resilient.watch import drawn, watch
from tests.unit.test_feed import LOOK

RANKS: list[dict[str, Any]] = [
    {"rank": 0, "node": "aaaaaaaaaaaa", "state": "computing", "speed": 1.0, "layers": [0, 3], "idle": 0.25},
    {"rank": 1, "node": "bbbbbbbbbbbb", "state": "stopped", "speed": None},
]


def shown(**look: Any) -> dict[str, Any]:
    spent = Spent()
    spent.look(0.0, waits=False)
    spent.committed(0, 1.0, 1.0)
    spent.committed(1, 4.0, 1.0)
    feed = Feed(lambda: Seen(figures=Figures(spent=spent), look={**LOOK, **look}))
    for step in range(300):
        feed.loss(step, 3.0 - step / 150)
    happening = Happening(kind="rank gone", reason="the process has ended")
    feed.happened({"unix": 0.0, "kind": happening.kind, "reason": happening.reason})
    return {"now": feed.now(), "history": feed.history(None)[0]}


def said(document: dict[str, Any], width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(drawn(document, width))
    return console.export_text()


def test_all_that_matters_is_there() -> None:
    text = said(shown(ranks=RANKS, step=300, loss=1.01, snapshots={"protected": 298.0}, checkpoints={"durable": -1}))
    assert "step 300 of 1000" in said(shown(step=300, steps=1000))
    for part in ("gpt, attempt 1", "step 300  ", "loss 1.01", "step 298 protected", "nothing durable yet"):
        assert part in text, text
    assert "productive 75.0%" in text and "starting 25.0%" in text
    assert "aaaaaaaa  computing" in text and "0-2" in text and "25%" in text and "stopped" in text
    assert "rank gone: the process has ended" in text
    assert "█▇" in text and "▁" in text, "losses fall"


def test_before_anything_has_happened() -> None:
    feed = Feed(lambda: Seen(figures=Figures(), look=LOOK))
    text = said({"now": feed.now(), "history": feed.history(None)[0]}, 40)
    assert "none yet" in text and "nothing is accounted for yet" in text


def test_many_ranks_are_summed_up() -> None:
    many = [{**RANKS[1], "rank": rank} for rank in range(500)]
    assert "484 more ranks" in said(shown(ranks=many))


def test_it_ends_with_the_run() -> None:
    def looks() -> Iterator[dict[str, Any] | None]:
        yield shown()
        yield None  # the controller is restarting
        yield shown(outcome={"outcome": "finished", "reason": "every rank has returned", "digest": ""})

    found, console = looks(), Console(file=io.StringIO(), width=100)
    assert watch(lambda: next(found), console)
    assert next(found, None) is None


def test_a_run_that_is_not_there_is_not_waited_for_long() -> None:
    assert not watch(lambda: None, Console(file=io.StringIO()), limit_s=0.0)
