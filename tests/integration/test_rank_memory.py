"""The memory limit of a pipeline's ranks, on real processes: nobody holds more, and what does not fit waits."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import pytest

import resilient
from resilient.core.seat import SeatReport
from snapshot.absent import is_absent
from tests import crew
from tests.integration.test_pipelines import alone
from tests.pipelines import train

STEPS = 10
HALF_BYTES = 800
"""The layers have 352, 424, 424, 0 and 352 bytes, the last ones shared with the first layer: two ranks suffice."""


class Held:
    """Notes how much a rank holds, and waits in step 4 until the file `go` is there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.go = folder, folder / "go"

    def __call__(self, run: resilient.Run) -> None:
        team: Any = run._team
        pipe = team._loop.objects()["user:model"]
        tensors = [*pipe.parameters(), *pipe.buffers()]
        held = sum(tensor.nbytes for tensor in tensors if not is_absent(tensor))
        draft = self.folder / f"draft of {team.generation} {team.number}"
        draft.write_text(str(held))  # whoever is killed just now leaves the draft
        draft.rename(self.folder / f"{team.generation}-{team.number}")
        while run.step == 4 and not self.go.exists() and not self.may_go_on(team):
            threading.Event().wait(0.01)

    def may_go_on(self, team: Any) -> bool:
        """Whether there is something to be done that needs the end of this step."""
        seat = team._seat
        return seat.proposal is not None or seat.restoring

    def most(self) -> int:
        return max(int(path.read_text()) for path in self.folder.glob("*-*"))


def trained(held: Held, on_report: Any, *, room: int) -> crew.Crew:
    (held.folder / "memory").mkdir()
    found = crew.run(
        *(functools.partial(train, rank_bytes=HALF_BYTES), 3, STEPS, None, False, "1f1b", held),
        workers=(1, 3),
        room=room,
        on_report=on_report,
        folder=held.folder / "memory",
    )
    assert found.end is not None and found.end.outcome == "finished", found.end
    assert found.end.digest == alone(steps=STEPS).digest
    return found


def waits_for_memory(hand: crew.Hand) -> bool:
    return any("more memory" in text for text in hand.said)


@pytest.mark.long
def test_too_few_wait_until_the_layers_fit(tmp_path: Path) -> None:
    held = Held(tmp_path)

    def change(report: SeatReport, hand: crew.Hand) -> None:
        if waits_for_memory(hand):
            hand.room(2)
        if report.formed:
            hand.room(3)
        if hand.plan is not None and hand.plan.size == 3:
            held.go.touch()

    found = trained(held, change, room=1)
    assert [plan.size for plan in found.plans[:2]] == [2, 3] and all(len(plan.stages) > 1 for plan in found.plans)
    assert any(text.startswith("waiting for nodes: ") and "more memory" in text for text in found.said), found.said
    assert held.most() <= HALF_BYTES


def test_after_a_loss_the_run_waits_until_the_layers_fit_again(tmp_path: Path) -> None:
    held = Held(tmp_path)
    killed: list[int] = []

    def change(report: SeatReport, hand: crew.Hand) -> None:
        if not killed and report.step == 4 and hand.plan is not None:
            killed.append(hand.plan.members[-1])
            hand.room(1)
            hand.kill(killed[0])
        if killed and waits_for_memory(hand):
            held.go.touch()
            hand.room(2)

    found = trained(held, change, room=2)
    assert [(plan.kind, len(plan.stages)) for plan in found.plans[:2]] == [("initial", 2), ("restored", 2)]
    assert held.most() <= HALF_BYTES
