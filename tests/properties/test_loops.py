"""Loops drawn by chance: the same bits in one process and on several ranks, or refused in both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import resilient
from tests import crew
from tests.loops_of_users import Program, composed

REFUSED = {
    "counter": r"run\.state\.seen was \w+ as one micro-batch of step 0 ended, and \d",
    "average": r"average\.updates was \d+ as one micro-batch of step 0 ended, and \d",
    "flag": r"model\.3\.p was 0\.\d+ as one micro-batch",
    "rate": r"optimizer\.param_groups\.0\.lr was",
    "weights": r"model\.4\.weight changed within step 0",
    "forward": r"model\.1\.running_mean changed after backward",
}

PROGRAMS = st.builds(
    Program,
    levels=st.sampled_from([1, 2]),
    optimizer=st.sampled_from(["SGD", "AdamW", "RMSprop"]),
    clip=st.booleans(),
    average=st.booleans(),
    schedule=st.booleans(),
    evaluate=st.sampled_from(["", "rank 0", "all"]),
    counter=st.booleans(),
    switch=st.sampled_from(["", "freeze", "thaw", "eval", "dropout", "group"]),
    wrong=st.sampled_from(["", "", "", *REFUSED]),
)


def alone(program: Program) -> resilient.Result | str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return resilient.train(name="alone")(composed).local(program)
    except resilient.LoopError as error:
        return str(error)
    finally:
        torch.set_num_threads(threads)


def check(program: Program, ranks: int) -> None:
    found: Any = alone(program)
    end = crew.run(composed, program, workers=(ranks, ranks)).end
    assert end is not None
    if isinstance(found, str):
        assert end.outcome == "failed" and "LoopError" in end.reason, (program, found, end)
    else:
        assert end.digest == found.digest, (program, end)
    may_pass = program.levels == 2 and program.wrong == "forward"  # there it is part of the micro-batch
    assert isinstance(found, str) == bool(program.wrong and not may_pass), (program, found)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program=PROGRAMS)
def test_the_same_bits_or_a_clear_word(program: Program) -> None:
    check(program, 2)


@pytest.mark.long
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program=PROGRAMS, ranks=st.sampled_from([2, 3, 4]))
def test_the_same_bits_or_a_clear_word_often(program: Program, ranks: int) -> None:
    check(program, ranks)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_refused_is_named(wrong: str, levels: int) -> None:
    if (wrong, levels) == ("forward", 2):
        assert not isinstance(alone(Program(levels=2, wrong="forward")), str)
        return
    found = alone(Program(levels=levels, wrong=wrong))
    assert isinstance(found, str)
    with pytest.raises(AssertionError, match=REFUSED[wrong]):
        raise AssertionError(found)
    assert "for step in run.steps(...)" in found
