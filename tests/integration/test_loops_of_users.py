"""Loops as people write them, in several layouts: real rank processes, without a cluster, one of them killed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import resilient
from tests import crew, loops_of_users

LOOPS = ("two_levels", "flat", "epochs", "adversarial", "switches", "loop_after_loop")
BY_EPOCHS = ("epochs", "loop_after_loop")
STEPS_PER_EPOCH = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loop(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(loops_of_users, name)
    return function


def alone(name: str, *args: Any) -> resilient.Result:
    return resilient.train(name="alone")(loop(name)).local(*args)


def length(name: str, steps: int) -> int:
    return steps // STEPS_PER_EPOCH if name in BY_EPOCHS else steps


def struck_in(name: str, steps: int) -> crew.Crew:
    """Three ranks, one of which is killed after some steps."""
    expected = alone(name, length(name, steps))
    struck: list[int] = []

    def strike(report: Any, hand: crew.Hand) -> None:
        if report.step >= 5 and not struck and hand.plan is not None and hand.plan.size == 3:
            struck.append(report.step)
            hand.kill(hand.plan.members[-1])

    found = crew.run(loop(name), length(name, steps), workers=(2, 3), on_report=strike)
    assert found.end is not None and found.end.digest == expected.digest, found.end
    assert struck and "unplanned" in [plan.kind for plan in found.plans]
    assert set(map(str, found.values.values())) == {str(expected.value)}
    return found


@pytest.mark.parametrize("name", LOOPS)
def test_a_rank_is_lost(name: str) -> None:
    struck_in(name, 12)


@pytest.mark.long
@pytest.mark.parametrize("name", LOOPS)
def test_a_replacement_joins(name: str) -> None:
    assert [plan.kind for plan in struck_in(name, 120).plans] == ["initial", "unplanned", "planned"]


@pytest.mark.parametrize("name", LOOPS)
def test_two_ranks(name: str) -> None:
    expected = alone(name, length(name, 8))
    found = crew.run(loop(name), length(name, 8), workers=(2, 2))
    assert found.end is not None and found.end.digest == expected.digest, found.end


def test_both_forms_are_one_loop() -> None:
    assert alone("flat", 5).digest == alone("two_levels", 5).digest


def test_a_difference_in_the_last_step_is_named() -> None:
    end = crew.run(loop("last_step_differs"), workers=(2, 2)).end
    assert end is not None and end.outcome == "failed"
    assert "ranks ended with different states in run.state (digests" in end.reason


@pytest.mark.parametrize(
    ("what", "words"),
    {
        "eval": r"step 2: model\.0\.training at the step's start is \w+ on rank 0 and \w+ .*run\.evaluating\(\)",
        "average": r"step 2: the bytes of average\.\S+ is \w+ on rank 0 and \w+ on rank 1;.*equal on all ranks",
        "tensor": r"step 2: the bytes of run\.state\S+ is \w+ on rank 0 and \w+ on rank 1;.*equal on all ranks",
        "state": r"step 2: run\.state\S* is .* on rank 0 and .* on rank 1;.*equal on all ranks",
        "rate": r"step 2: optimizer\.param_groups\.0\.lr is 0\.01 on rank 0 and 0\.05 on rank 1; it must be computed",
    }.items(),
)
@pytest.mark.parametrize("snapshots", [False, True])
def test_what_one_rank_does_alone_is_named_and_no_machine_blamed(
    what: str, words: str, snapshots: bool, tmp_path: Path
) -> None:
    found = crew.run(loop("one_rank_alone"), what, workers=(2, 2), folder=tmp_path if snapshots else None)
    assert found.end is not None and found.end.outcome == "failed"
    assert re.search(words, found.end.reason, re.DOTALL), found.end.reason
    assert "suspect" not in found.end.reason + "".join(found.said)


@pytest.mark.parametrize("form", ["run.epochs", "range"])
def test_going_back_within_an_epoch(form: str, tmp_path: Path) -> None:
    found = crew.run(loop("goes_back"), form, str(tmp_path / "asked"), workers=(2, 2), folder=tmp_path)
    assert found.end is not None and found.end.outcome == "finished", found.end
    assert [plan.kind for plan in found.plans] == ["initial", "restored"]
    assert list(found.values.values()) == [(16, [0, 1, 2, 3])] * 2
