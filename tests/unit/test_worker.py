"""A rank's process around the user's function: what it finds there, and how its end is told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.rank import Host
from resilient import sums
from resilient.core.events import RankFailed
from resilient.function_store import store_function
from resilient.packing import packed_call
from resilient.worker import RankBody
from tests.cluster_keys import keys_in_memory
from tests.jobs import job


class Told:
    """In place of host and member: keeps what they are told."""

    def __init__(self, broken: str = "") -> None:
        self.member = SimpleNamespace(step=3, device=torch.device("cpu"), telling=self)
        self.text, self.crashed, self.at_last = "", "", list[Any]()
        self._broken = broken

    def failed(self, step: int, text: str) -> None:
        if self._broken:
            raise RuntimeError(self._broken)
        assert step == 3
        self.text = text

    def crashed_here(self, text: str) -> None:
        self.crashed = text

    def tell_at_last(self, *messages: object) -> None:
        self.at_last += messages


def told(function: Callable[..., Any], *argv: str, broken: str = "") -> Told:
    """What a rank that runs this function tells."""
    found = Told(broken)
    body = RankBody.__new__(RankBody)
    body._job = replace(job("gpt", observe=None), function=store_function("gpt/1", argv, packed_call(function, (), {})))
    host: Any = SimpleNamespace(member=7, folder=None, tell_at_last=found.tell_at_last)
    assert hasattr(Host, "tell_at_last")
    body._host, body._member = host, found.member  # type: ignore[assignment]
    body.train()
    return found


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    keys_in_memory(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["default_worker.py", "--node-ip-address=10.0.0.7"])


def parsing(run: Any) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, required=True)
    raise KeyError(f"lr is {parser.parse_args().lr}")


def test_the_function_finds_the_drivers_arguments() -> None:
    assert "lr is 0.5" in told(parsing, "train.py", "--lr", "0.5").text


def test_what_argparse_says_is_told() -> None:
    text = told(parsing, "train.py", "--rate", "0.5").text
    assert "SystemExit: 2" in text and "sys.exit ends the run as any exception does" in text
    assert "usage: train.py [-h] --lr LR\ntrain.py: error: the following arguments are required: --lr" in text


def test_so_is_help_and_a_plain_exit() -> None:
    assert "show this help message and exit" in told(parsing, "train.py", "--help").text

    def leaving(run: Any) -> None:
        sys.exit(0)

    assert "to end it early, leave the loop" in told(leaving, "train.py").text


def test_other_errors_are_told_without_it() -> None:
    assert "sys.exit" not in told(parsing, "train.py", "--lr", "1").text


def mistaken(run: Any) -> None:
    raise KeyError("a mistake in the loop")


@pytest.mark.parametrize("version", ["new", "old"])
def test_a_mistake_is_told_on_any_version_of_torch(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    if version == "old":  # before 2.8
        monkeypatch.delattr(torch, "AcceleratorError", raising=False)
    found = told(mistaken)
    assert "KeyError: 'a mistake in the loop'" in found.text and not found.at_last


def test_a_mistake_is_told_although_telling_fails() -> None:
    (failed,) = told(mistaken, broken="no words").at_last
    assert isinstance(failed, RankFailed) and failed.member == 7
    assert "KeyError: 'a mistake in the loop'" in failed.traceback
    assert "could not be told as usual" in failed.traceback and "RuntimeError: no words" in failed.traceback


def test_an_exception_that_cannot_be_shown_is_named() -> None:
    class Unspeakable(Exception):
        @property
        def __notes__(self) -> list[str]:
            raise SystemError("not even notes")

        def __str__(self) -> str:
            raise SystemError("no words")

    def failing(run: Any) -> None:
        raise Unspeakable

    text = told(failing).text
    assert "in failing" in text and "Unspeakable" in text


def without_memory(run: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_out_of_memory_is_the_functions_own_unless_the_runtime_was_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """More micro-batches after a loss take more sums: no mistake of the function's."""
    ended: list[int] = []
    monkeypatch.setattr("resilient.worker.os._exit", ended.append)
    found = told(without_memory)
    assert "CUDA out of memory" in found.text and not found.crashed and not ended
    file = sums.__file__

    def folding(run: Any) -> None:
        exec(compile("raise torch.OutOfMemoryError('for sums')", file, "exec"), {"torch": torch})

    assert "for sums" in told(folding).crashed and ended == [1]
