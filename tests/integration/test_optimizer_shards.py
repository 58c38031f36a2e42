"""Optimizer state in shards, over real processes: the same bits as whole, whoever joins and leaves, and less memory."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resilient
from resilient.core.seat import SeatReport
from snapshot.absent import is_absent, parts_of
from snapshot.core import chunks
from tests import crew
from tests.lion import Lion
from tests.pipelines import Text, loss_of
from tests.stages import small_chunks

CHUNK = 1024
WIDTH, STEPS = 40, 6

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, amsgrad=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2),
    "lion": lambda parameters: Lion(parameters, 1e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True),
}


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(torch.nn.functional.dropout(self.linear(hidden), 0.1))


def layers() -> list[Any]:
    return [
        functools.partial(nn.Embedding, 11, WIDTH),
        Mixing,
        Mixing,
        functools.partial(nn.Linear, WIDTH, 11, bias=False),
    ]


def train(
    run: resilient.Run, stages: int, steps: int = STEPS, which: str = "adamw", shard: bool = True, hold: str = ""
) -> tuple[int, int]:
    """Elements of optimizer state that are here, and of all that there are for the layers here. hold: steps are slow
    until this file is there."""
    chunks.CHUNK_ELEMENTS = CHUNK  # of a process of its own; the test's own is told by `small_chunks`
    pipe = run.pipeline(
        layers(), loss_of, stages=stages, tied={"layers.3.weight": "layers.0.weight"}, shard_optimizer=shard
    )
    embedding, *others = pipe.parameters()
    # Two optimizers, of which the second one changes a part of what the first one has changed.
    first, second = OPTIMIZERS[which]([embedding, *others]), torch.optim.SGD(others[:1], 1e-3, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(first, 2)
    run.protect(model=pipe, first=first, second=second, scheduler=scheduler)
    for step in run.steps(Text(), global_batch=8, micro_batch=2, steps=steps):
        pipe.train_step(step)
        run.clip_grad_norm_(1.0)
        first.step()
        with torch.no_grad():
            for parameter in filter(lambda each: not is_absent(each), pipe.parameters()):
                parameter.mul_(0.99)
        second.step()
        scheduler.step()
        first.zero_grad()
        if hold and not os.path.exists(hold):
            threading.Event().wait(0.1)
    states = [state for parameter in others if not is_absent(parameter) and (state := first.state.get(parameter))]
    return sum(map(here, states)), sum(value.numel() for state in states for value in state.values() if value.dim())


def here(state: dict[str, Tensor]) -> int:
    found = 0
    for value in state.values():
        if value.dim():
            found += sum(part.numel() for _, part in parts_of(value)) if is_absent(value) else value.numel()
    return found


@functools.cache
def alone(steps: int = STEPS, which: str = "adamw") -> str:
    """The digest of a run in one process without shards."""
    with small_chunks(CHUNK):
        return resilient.train(workers=1, name="alone")(train).local(1, steps, which, False).digest


def check(found: crew.Crew, digest: str) -> None:
    assert found.end is not None and found.end.outcome == "finished", found.end
    assert found.end.digest == digest


def test_one_process_has_the_same_bits_with_shards() -> None:
    with small_chunks(CHUNK):
        assert resilient.train(workers=1, name="alone")(train).local(1).digest == alone()


@pytest.mark.parametrize(
    ("stages", "ranks"),
    [(2, 3), *(pytest.param(*layout, marks=pytest.mark.long) for layout in ((1, 2), (1, 3), (2, 2)))],
)
def test_every_layout_comes_to_the_same_bits(stages: int, ranks: int) -> None:
    check(crew.run(train, stages, workers=(ranks, ranks)), alone())


@pytest.mark.long
@pytest.mark.parametrize("which", [name for name in OPTIMIZERS if name != "adamw"])
def test_every_optimizer_comes_to_the_same_bits(which: str) -> None:
    check(crew.run(train, 2, STEPS, which, workers=(3, 3)), alone(which=which))


def test_each_rank_keeps_its_part_only() -> None:
    found = crew.run(train, 1, workers=(3, 3))
    totals = {total for _, total in found.values.values()}
    (total,) = totals
    kept = sorted(mine for mine, _ in found.values.values())
    assert len(kept) == 3 and sum(kept) == total, "each element is with one rank"
    most = 3 * CHUNK  # a chunk of each of three tensors
    assert kept[0] > 0 and kept[-1] <= total / 3 + most


@pytest.mark.long
@pytest.mark.parametrize("stages", [1, 2])
def test_chunks_move_to_whoever_joins_and_away_from_whoever_leaves(stages: int, tmp_path: Path) -> None:
    done: list[str] = []

    def change(report: SeatReport, hand: crew.Hand) -> None:
        plan = hand.plan
        if not done and report.step >= 3:
            done.append("joined")
            hand.room(3)
        if done == ["joined"] and plan is not None and plan.size == 3 and report.step >= 6:
            done.append("left")
            hand.room(2)
            hand.ask_to_leave(plan.members[0])
        if len(done) == 2 and plan is not None and plan.size == 2:
            (tmp_path / "go").touch()

    steps = 150
    found = crew.run(
        train, stages, steps, "adamw", True, str(tmp_path / "go"), workers=(2, 3), room=2, on_report=change
    )
    check(found, alone(steps))
    (leaver,) = next(plan.emptied for plan in found.plans if plan.emptied)
    assert leaver not in found.plans[-1].members, "it has given its chunks away before it left"
    assert {plan.size for plan in found.plans} == {2, 3}
    assert all(plan.kind in ("initial", "planned") for plan in found.plans), "nothing is aborted"


@pytest.mark.long
def test_a_broken_link_loses_nothing(tmp_path: Path) -> None:
    """All form again, and have the values of each other's chunks, whatever was under way."""
    cut: list[int] = []

    def break_links(report: SeatReport, hand: crew.Hand) -> None:
        plan = hand.plan
        if plan is not None and len(cut) < 3 and report.step >= 3 + 3 * len(cut) and plan.size == 3:
            cut.append(report.step)
            hand.cut(plan.members[0], plan.members[1])
        if plan is not None and plan.kind == "unplanned" and len(cut) == 3:
            (tmp_path / "go").touch()

    found = crew.run(train, 2, 100, "adamw", True, str(tmp_path / "go"), workers=(3, 3), room=3, on_report=break_links)
    check(found, alone(100))
    assert {plan.kind for plan in found.plans} >= {"initial", "unplanned"}
    assert all(plan.members == found.plans[0].members for plan in found.plans)


def test_a_death_loses_state(tmp_path: Path) -> None:
    """Others can't go on, although they have all parameters."""
    killed: list[int] = []

    def kill(report: SeatReport, hand: crew.Hand) -> None:
        if not killed and report.step >= 3 and hand.plan is not None:
            killed.append(hand.plan.members[-1])
            hand.kill(killed[0])

    hold = str(tmp_path / "never")
    found = crew.run(train, 1, 400, "adamw", True, hold, workers=(2, 3), room=3, on_report=kill)
    assert found.end is not None and found.end.outcome == "failed"
    assert "optimizer state" in found.end.reason
    assert [plan.kind for plan in found.plans] == ["initial"]
