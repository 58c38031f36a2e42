"""Loops of well-known scripts: the numbers of plain PyTorch, and the same bits on four ranks of which one dies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import resilient
from tests import crew
from tests.known_loops import LOOPS, nothing_of, parameters_of
from tests.plain_run import PlainRun


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LOOPS)
def test_the_numbers_of_plain_pytorch(name: str) -> None:
    found = resilient.train(name="alone")(parameters_of).local(name).value
    for mine, plain in zip(found, parameters_of(PlainRun(), name), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOOPS)
def test_the_same_bits_on_four_ranks_of_which_one_dies(name: str) -> None:
    """Six micro-batches on four ranks are an uneven deal."""
    expected = resilient.train(name="alone")(nothing_of).local(name).digest
    struck: list[int] = []

    def strike(report: Any, hand: crew.Hand) -> None:
        if report.step >= 1 and not struck and hand.plan is not None:
            struck.append(report.step)
            hand.kill(hand.plan.members[-1])

    found = crew.run(nothing_of, name, workers=(3, 4), on_report=strike)
    assert found.end is not None and found.end.digest == expected, found.end
    assert struck
