"""What travels as layers move, on real processes: what the planner says, each byte once, and nothing else."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

import resilient
from actors.group import Group
from resilient.core.plan import Plan
from resilient.core.seat import SeatReport
from resilient.moving import Moving
from tests import crew
from tests.pipelines import Text, loss_of

STEPS, WIDTHS = 12, (8, 24, 16, 40, 8, 32)


def layers() -> list[Any]:
    pairs = zip(WIDTHS, (*WIDTHS[1:], 11), strict=True)
    return [functools.partial(nn.Embedding, 11, WIDTHS[0]), *(functools.partial(nn.Linear, *pair) for pair in pairs)]


@functools.cache
def layer_bytes() -> tuple[int, ...]:
    return tuple(sum(parameter.nbytes for parameter in build().parameters()) for build in layers())


def train(run: resilient.Run, folder: Path | None = None) -> None:
    """Without optimizer state: what a layer weighs is all that there is of it. In step 4 ranks wait for what comes."""
    team: Any = run._team
    if folder is not None:
        _count_received(team, folder)
    pipe = run.pipeline(layers(), loss_of, stages=3)
    optimizer = torch.optim.SGD(pipe.parameters(), 0.1)
    run.protect(model=pipe, optimizer=optimizer)
    for step in run.steps(Text(), global_batch=12, micro_batch=2, steps=STEPS):
        pipe.train_step(step)
        optimizer.step()
        optimizer.zero_grad()
        while folder is not None and run.step == 4 and team._seat.proposal is None:
            threading.Event().wait(0.01)


def _count_received(team: Any, folder: Path) -> None:
    """While layers move, by generation and member, in this process, which is a rank's own."""
    move, post_host, moving = Moving.move, Group.post_host, threading.local()

    def counted_move(self: Moving, *args: Any) -> None:
        moving.now = True
        move(self, *args)
        moving.now = False

    def counted_post(self: Group, sends: Any, receives: Any) -> Any:
        if getattr(moving, "now", False):
            with (folder / f"{team.generation}-{team.number}").open("a") as received:
                received.write(f"{sum(move.data.nbytes for move in receives)}\n")
        return post_host(self, sends, receives)

    Moving.move, Group.post_host = counted_move, counted_post  # type: ignore[method-assign]


def held(plan: Plan, member: int) -> set[int]:
    stage = plan.stage_of(plan.rank_of(member)) if member in plan.ranks else None
    return set() if stage is None else set(range(stage.first, stage.stop))


def moved(before: Plan, after: Plan, member: int) -> int:
    """To this member, as the plans say."""
    return sum(layer_bytes()[layer] for layer in held(after, member) - held(before, member))


def received(folder: Path, plan: Plan, member: int) -> int:
    path = folder / f"{plan.generation}-{member}"
    return sum(map(int, path.read_text().split())) if path.exists() else 0


def in_words(nbytes: int) -> str:
    return f"{nbytes / 1000:.3g} KB of layers move"


def test_the_layers_of_whoever_leaves_travel_and_nothing_else(tmp_path: Path) -> None:
    asked: list[int] = []

    def leave(report: SeatReport, hand: crew.Hand) -> None:
        if not asked and report.step == 4 and hand.plan is not None:
            asked.append(hand.plan.members[1])
            hand.room(2)
            hand.ask_to_leave(asked[0])

    found = crew.run(train, tmp_path, workers=(1, 3), room=3, on_report=leave)
    assert found.end is not None and found.end.outcome == "finished", found.end
    assert found.end.digest == resilient.train(workers=1, name="alone")(train).local().digest
    by_number = {plan.generation: plan for plan in found.plans}
    changes = [(by_number[plan.base], plan) for plan in found.plans if plan.kind == "planned"]
    for before, after in changes:
        for member in after.members:
            assert received(tmp_path, after, member) == moved(before, after, member), (before, after)
    before, first = changes[0]
    staying = [member for member in first.members if member not in asked]
    total = sum(moved(before, first, member) for member in staying)
    assert total >= sum(layer_bytes()[layer] for layer in held(before, asked[0])), "all that it had"
    assert in_words(total) in first.reason
