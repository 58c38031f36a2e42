"""Loops as people write them, in several layouts: real rank processes, without a cluster, one of them killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
