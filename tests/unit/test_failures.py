"""A budget of failures, and one error that comes back wherever it is tried."""

from __future__ import annotations

import pytest

import resilient
from resilient.core.control import Control
from resilient.core.events import GenerationCreated, NodeGone, NodeSeen, RankCrashed, RankGone, RankReady, Resumed
from resilient.core.failures import CRASHES_ON_ONE_NODE, Crash, Failures
from resilient.core.instructions import End, Instruction
from resilient.core.limits import Limits
from resilient.core.plan import Address

TRACEBACK = "Traceback ...\ntorch.AcceleratorError: CUDA error: device-side assert triggered at 0x7f{}"


def test_more_failures_within_an_hour_than_allowed() -> None:
    failures = Failures(per_hour=2)
    assert failures.lost(0.0) is None and failures.lost(1800.0) is None
    assert failures.lost(3601.0) is None, "the first is more than an hour ago"
    reason = failures.lost(3602.0)
    assert reason is not None and "3 failures" in reason and "max_failures=2" in reason
    assert failures.total == 4


def test_no_limit() -> None:
    failures = Failures()
    assert all(failures.lost(float(second)) is None for second in range(1000))


def crash(member: int, node: str) -> Crash:
    return Crash(member, node, TRACEBACK.format(member))


def test_the_same_error_at_the_same_step_on_other_nodes() -> None:
    failures = Failures()
    assert failures.crashed(7, crash(1, "a")) is None
    assert failures.crashed(7, crash(1, "a")) is None, "said twice"
    assert failures.crashed(7, crash(2, "b")) is None
    assert failures.crashed(8, crash(3, "c")) is None, "at another step"
    reason = failures.crashed(7, crash(4, "a"))
    assert reason is not None and "3 ranks at step 7 (node a, b)" in reason and "device-side assert" in reason


def test_one_node_may_be_broken_a_little_longer() -> None:
    failures = Failures()
    said = [failures.crashed(7, crash(member, "a")) for member in range(CRASHES_ON_ONE_NODE)]
    assert said[:-1] == [None] * (CRASHES_ON_ONE_NODE - 1) and said[-1] is not None


def test_another_error_is_another_matter() -> None:
    failures = Failures()
    for member, error in enumerate(("ECC error", "launch timed out", "out of resources", "misaligned address")):
        assert failures.crashed(7, Crash(member, f"node{member}", f"...\nCUDA error: {error}")) is None


# In the controller


class Run:
    """Two ranks on two nodes, formed; members are replaced at once."""

    def __init__(self, **limits: int) -> None:
        self.control = Control(limits=Limits(min_workers=1, max_workers=2, **limits))
        self.now = 0.0
        for node in "ab":
            self.take(NodeSeen(node=node, capacity=3))
        for member, node in ((1, "a"), (2, "b")):
            self.ready(member, node)
        self.take(GenerationCreated(generation=1))

    def take(self, event: object) -> tuple[Instruction, ...]:
        self.now += 0.01
        return self.control.handle(event, self.now)  # type: ignore[arg-type]

    def ready(self, member: int, node: str) -> None:
        address = Address(host=node, port=member)
        self.take(
            RankReady(member=member, node=node, address=address, micro_batches=6, steps=9, probe="p", probe_fields="f")
        )


def ends(instructions: tuple[Instruction, ...]) -> list[End]:
    return [item for item in instructions if isinstance(item, End)]


def test_the_budget_ends_the_run_and_says_what_was_last() -> None:
    run = Run(max_failures=1)
    assert not ends(run.take(RankGone(member=1, why="the process has ended")))
    (end,) = ends(run.take(RankGone(member=2, why="the process is stopped")))
    assert end.outcome == "failed" and "max_failures=1" in end.reason
    assert "the last one: a rank on node a: the process is stopped" in end.reason


def test_a_node_is_one_failure_whatever_was_on_it_and_an_empty_one_is_none() -> None:
    run = Run(max_failures=1)
    run.ready(3, "a")
    assert not ends(run.take(NodeGone(node="a", why="its keeper has fallen silent")))
    run.take(NodeSeen(node="c", capacity=1))
    assert not ends(run.take(NodeGone(node="c", why="its keeper has fallen silent")))
    assert run.control.deaths.failures.total == 1


def test_what_died_before_this_controller_came_is_not_counted() -> None:
    control = Control(limits=Limits(min_workers=1, max_workers=2, max_failures=0))
    control.handle(Resumed(plans=(), spawned=((1, "a"), (2, "b"))), 0.0)
    assert not ends(control.handle(RankGone(member=1, why="it was gone when the controller came back"), 0.1))


def test_a_crash_is_a_loss_until_it_comes_back_elsewhere() -> None:
    run = Run()
    first = run.take(RankCrashed(member=1, step=4, traceback=TRACEBACK))
    assert not ends(first) and "machine error in step 4: torch.AcceleratorError" in str(first)
    run.ready(3, "b")
    assert not ends(run.take(RankCrashed(member=3, step=4, traceback=TRACEBACK)))
    (end,) = ends(run.take(RankCrashed(member=2, step=4, traceback=TRACEBACK)) or ())
    assert "3 ranks at step 4" in end.reason


@pytest.mark.parametrize("value", [-1, 1.5, "3", True])
def test_max_failures_is_a_whole_number(value: object) -> None:
    with pytest.raises(ValueError, match=r"max_failures="):
        resilient.train(name="x", max_failures=value)(lambda run: None)  # type: ignore[arg-type]
