"""The controller's mind, told as transcripts: facts in, instructions out."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace

import pytest

from resilient.core.control import Control
from resilient.core.events import (
    Event,
    GenerationCreated,
    GenerationTaken,
    NodeGone,
    NodeSeen,
    RankFailed,
    RankGone,
    RankPending,
    RankReady,
    RankReported,
    RankReturned,
    Resumed,
    StopAsked,
    Tick,
)
from resilient.core.instructions import (
    CreateGeneration,
    End,
    Instruction,
    Kill,
    LetGo,
    ProbeLinks,
    Say,
    SendPlan,
    Spawn,
    TakeInventory,
)
from resilient.core.limits import Limits
from resilient.core.plan import Address
from resilient.core.seat import SeatReport


def in_words(instruction: Instruction) -> str:
    match instruction:
        case Spawn(member=member, node=node):
            return f"spawn {member} on {node}"
        case Kill(member=member, released=True):
            return f"release {member}"
        case Kill(member=member):
            return f"kill {member}"
        case LetGo(node=node):
            return f"let go of {node}"
        case CreateGeneration(plan=plan):
            return f"create {plan.generation} {plan.kind} from {plan.base} of {plan.members}"
        case SendPlan(member=member, plan=plan):
            return f"send {plan.generation} to {member}"
        case TakeInventory():
            return "take inventory"
        case ProbeLinks(generation=generation):
            return f"probe {generation}"
        case Say(text=text):
            return f"say {text}"
        case End(outcome=outcome, reason=reason):
            return f"end {outcome}: {reason}"


@dataclass
class Scenario:
    limits: Limits = field(default_factory=lambda: Limits(min_workers=1, max_workers=2, detection_s=2.0))
    now: float = 0.0
    reports: int = 0
    control: Control = field(init=False)

    def __post_init__(self) -> None:
        self.control = Control(limits=self.limits)

    def take(self, event: Event, after_s: float = 0.01) -> list[str]:
        self.now += after_s
        words = [in_words(instruction) for instruction in self.control.handle(event, self.now)]
        return [text for text in words if not text.startswith("say ")]

    def ready(self, member: int, node: str = "a", *, micro_batches: int = 4, probe: str = "p") -> list[str]:
        return self.take(
            RankReady(
                member=member,
                node=node,
                address=Address(host="h", port=member),
                micro_batches=micro_batches,
                steps=3,
                probe=probe,
                probe_fields=f"torch {probe}",
            )
        )

    def report(
        self,
        member: int,
        generation: int,
        *,
        formed: int | None = None,
        broken: int = 0,
        step: int = 0,
        complete: int = -1,
        finished: bool = False,
        waiting: bool = False,
        at_rest: bool = False,
        serial: int | None = None,
    ) -> list[str]:
        self.reports += 1
        report = SeatReport(
            serial=self.reports if serial is None else serial,
            member=member,
            generation=generation,
            formed=generation if formed is None else formed,
            broken=broken,
            step=step,
            complete=complete,
            finished=finished,
            waiting=waiting,
            at_rest=at_rest,
        )
        return self.take(RankReported(report=report))

    def begun(self) -> Scenario:
        """Ranks 1 and 2 on node a, generation 1 formed."""
        self.take(NodeSeen(node="a", capacity=4))
        self.ready(1)
        self.ready(2)
        self.take(GenerationCreated(generation=1))
        self.report(1, 1)
        self.report(2, 1)
        return self


def test_a_run_from_its_beginning_to_its_end() -> None:
    run = Scenario()
    assert run.take(NodeSeen(node="a", capacity=4)) == ["spawn 1 on a", "spawn 2 on a"]
    assert run.ready(1) == []
    assert run.ready(2) == ["create 1 initial from 0 of (1, 2)"]
    assert run.ready(2) == []
    assert run.take(GenerationCreated(generation=1)) == ["send 1 to 1", "send 1 to 2"]
    assert run.report(1, 1) == []
    assert run.report(2, 1, step=3, complete=2, finished=True) == []
    assert run.report(1, 1, step=3, complete=2, finished=True) == []
    assert run.take(RankReturned(member=1, step=3, digest="d")) == []
    assert run.take(RankReturned(member=2, step=3, digest="d")) == ["end finished: every rank has returned"]
    assert run.take(RankGone(member=2, why="late")) == []


def test_a_death_and_the_replacement() -> None:
    run = Scenario().begun()
    assert run.take(RankGone(member=2, why="killed")) == ["kill 2", "create 2 unplanned from 1 of (1,)", "spawn 3 on a"]
    assert run.take(RankGone(member=2, why="killed")) == []
    assert run.take(GenerationCreated(generation=2)) == ["send 2 to 1"]
    assert run.report(1, 2) == []
    assert run.ready(3) == ["create 3 planned from 2 of (1, 3)"]
    assert run.take(GenerationCreated(generation=3)) == ["send 3 to 1", "send 3 to 3"]
    assert run.report(2, 1, step=9) == []


def test_whoever_reports_an_older_generation_is_sent_the_newest_again_but_not_too_often() -> None:
    run = Scenario().begun()
    run.take(RankGone(member=2, why="killed"))
    run.take(GenerationCreated(generation=2))
    assert run.report(1, 1, step=1) == []
    run.now += 1.0
    assert run.report(1, 1, step=1) == ["send 2 to 1"]


def test_a_report_that_was_overtaken_is_ignored() -> None:
    run = Scenario().begun()
    run.report(1, 1, step=2, complete=1, serial=9)
    before = deepcopy(run.control.membership)
    run.report(1, 1, step=1, complete=1, serial=8)
    assert run.control.membership == before


def test_a_death_while_the_next_generation_is_being_created_takes_another_number() -> None:
    run = Scenario(limits=Limits(min_workers=1, max_workers=3))
    run.take(NodeSeen(node="a", capacity=3))
    for member in (1, 2, 3):
        run.ready(member)
    run.take(GenerationCreated(generation=1))
    for member in (1, 2, 3):
        run.report(member, 1)
    assert "create 2 unplanned from 1 of (1, 2)" in run.take(RankGone(member=3, why="killed"))
    assert run.take(RankGone(member=2, why="killed")) == ["kill 2"]
    assert "create 3 unplanned from 1 of (1,)" in run.take(GenerationCreated(generation=2))


def test_a_plan_that_comes_too_late_does_not_keep_the_run_from_ending() -> None:
    run = Scenario().begun()
    run.take(RankGone(member=2, why="killed"))
    run.take(GenerationCreated(generation=2))
    run.report(1, 2)
    run.ready(3)
    run.take(GenerationCreated(generation=3))
    run.report(3, 3, formed=0)
    run.report(1, 2, step=3, complete=2, finished=True)
    assert run.take(RankReturned(member=1, step=3, digest="d")) == ["end finished: every rank has returned"]


@pytest.mark.parametrize(("waiting_at", "returned_at"), [(2, None), (4, None), (None, 3)])
def test_a_rank_that_leaves_the_loop_before_others_ends_the_run(
    waiting_at: int | None, returned_at: int | None
) -> None:
    """The others wait for its part of the next step, or have it from their base: it never comes."""
    run = Scenario().begun()
    assert run.report(1, 1, step=2, complete=1, finished=True) == []
    out = run.take(RankReturned(member=1, step=2, digest="d"))
    if waiting_at is not None:
        out += run.report(2, 1, step=waiting_at, complete=waiting_at - 1, waiting=True)
    if returned_at is not None:
        out += run.take(RankReturned(member=2, step=returned_at, digest="e"))
    (end,) = out
    assert end.startswith(
        "end failed: rank 0 left the training loop at step 2, rank 1 went on to step "
        f"{waiting_at or returned_at}: leave it only on what is equal"
    )


def test_the_one_that_waits_is_named_and_no_other() -> None:
    run = Scenario(limits=Limits(min_workers=1, max_workers=3))
    run.take(NodeSeen(node="a", capacity=3))
    for member in (1, 2, 3):
        run.ready(member)
    run.take(GenerationCreated(generation=1))
    run.report(2, 1, step=2, complete=1)
    run.report(3, 1, step=2, complete=1, waiting=True)
    (end,) = run.take(RankReturned(member=1, step=2, digest="d"))
    assert "rank 0 left the training loop at step 2, rank 2 went on to step 2" in end


def test_others_that_are_still_on_their_way_to_the_end_are_waited_for() -> None:
    run = Scenario().begun()
    assert run.report(2, 1, step=1, complete=0, waiting=True) == []
    assert run.take(RankReturned(member=1, step=2, digest="d")) == []
    assert run.report(2, 1, step=2, complete=1) == []
    assert run.take(RankReturned(member=2, step=2, digest="d")) == ["end finished: every rank has returned"]


@pytest.mark.parametrize("finished", [False, True])
def test_nobody_joins_when_one_is_through_with_the_loop(finished: bool) -> None:
    run = Scenario().begun()
    run.take(RankGone(member=2, why="killed"))
    run.take(GenerationCreated(generation=2))
    run.report(1, 2, step=3, complete=2, finished=finished)
    assert run.ready(3) == ([] if finished else ["create 3 planned from 2 of (1, 3)"])


def test_another_controller_created_it_first() -> None:
    run = Scenario().begun()
    run.take(RankGone(member=2, why="killed"))
    assert run.take(GenerationTaken(generation=2)) == ["end superseded: generation 2 was created by another controller"]


def test_a_release_that_finds_a_newer_generation_shows_another_controller() -> None:
    run = Scenario().begun()
    assert run.take(GenerationTaken(generation=1)) == [], "this one's own"
    assert run.take(GenerationTaken(generation=2)) == ["end superseded: generation 2 was created by another controller"]


def test_a_generation_nobody_here_created_shows_another_controller() -> None:
    run = Scenario().begun()
    assert run.report(1, 2) == ["end superseded: generation 2 was created by another controller"]


def test_the_loss_of_all_is_said_after_a_last_look_for_reports() -> None:
    run = Scenario().begun()
    run.take(NodeGone(node="a", why="silent"))
    assert run.take(Tick()) == []
    (end,) = run.take(Tick(), after_s=3.0)
    assert end.startswith("end failed: lost rank 0 (node a), 1 (node a); no rank of generation 1 is left")


def test_an_exception_from_the_function_ends_the_run_at_once() -> None:
    run = Scenario().begun()
    (end,) = run.take(RankFailed(member=2, step=1, traceback="ValueError: no"))
    assert end == "end failed: the training function raised on rank 1 (node a) in step 1:\nValueError: no"


def test_stop_is_obeyed() -> None:
    assert Scenario().begun().take(StopAsked(why="asked")) == ["end stopped: asked"]


def test_different_loops_and_different_bits_end_the_run() -> None:
    run = Scenario()
    run.take(NodeSeen(node="a", capacity=4))
    run.ready(1)
    assert run.ready(2, micro_batches=5)[0].startswith("end failed: ranks disagree about their loop")
    run = Scenario()
    run.take(NodeSeen(node="a", capacity=4))
    run.ready(1)
    assert run.ready(2, probe="q")[0].startswith("end failed: node a computes other bits than node a: torch q against")


def test_ranks_that_never_reach_the_loop_end_the_run() -> None:
    run = Scenario(limits=Limits(min_workers=1, max_workers=1))
    run.take(NodeSeen(node="a", capacity=1))
    assert run.take(RankGone(member=1, why="x")) == ["kill 1", "spawn 2 on a"]
    assert run.take(RankGone(member=2, why="x")) == ["kill 2", "spawn 3 on a"]
    assert run.take(RankGone(member=3, why="x")) == ["kill 3"]
    assert run.take(Tick(), after_s=7.0) == [], "the death of their node, which would explain it, may still be told"
    assert run.take(Tick(), after_s=2.0) == [
        "end failed: 3 ranks in a row died before they reached the training loop; the workers' logs say why"
    ]


def test_ranks_that_die_in_their_loop_are_no_failed_starts() -> None:
    run = Scenario(limits=Limits(min_workers=1, max_workers=4))
    run.take(NodeSeen(node="a", capacity=8))
    for member in (1, 2, 3, 4):
        run.ready(member)
    run.take(GenerationCreated(generation=1))
    for generation, member in enumerate((2, 3, 4), 2):
        run.take(RankGone(member=member, why="x"))
        run.take(GenerationCreated(generation=generation))
    assert run.take(Tick(), after_s=9.0) == []
    assert run.take(RankGone(member=5, why="x")) == ["kill 5", "spawn 8 on a"]


def test_ranks_that_died_with_their_node_are_no_failed_starts() -> None:
    run = Scenario(limits=Limits(min_workers=1, max_workers=3))
    run.take(NodeSeen(node="a", capacity=3))
    for member in (1, 2, 3):
        run.take(RankGone(member=member, why="x"))
    run.take(NodeGone(node="a", why="silent"))
    assert run.take(Tick(), after_s=5.0) == []
    assert run.take(NodeSeen(node="b", capacity=1)) == ["spawn 6 on b"]


def test_a_restarted_controller_waits_for_a_word_about_every_rank() -> None:
    first = Scenario().begun()
    plan = first.control.plans[1]
    run = Scenario()
    run.take(Resumed(plans=(plan,), spawned=((1, "a"), (2, "a"), (3, "a"))))
    run.take(NodeSeen(node="a", capacity=4))
    assert run.report(1, 1) == []
    assert run.take(RankGone(member=3, why="not there")) == ["kill 3"]
    assert run.control.unheard == {2}
    assert run.report(2, 1) == []
    assert "create 2 unplanned from 1 of (1,)" in run.take(RankGone(member=2, why="killed"))


def test_a_restarted_controller_does_not_wait_for_ranks_that_wait_for_a_place() -> None:
    plan = Scenario().begun().control.plans[1]
    run = Scenario()
    run.take(Resumed(plans=(plan,), spawned=((1, "a"), (2, "a"), (3, "b"))))
    run.take(NodeSeen(node="a", capacity=4))
    run.report(1, 1)
    run.report(2, 1)
    assert "create 2 unplanned from 1 of (1,)" in run.take(RankGone(member=2, why="killed"))
    run.take(RankPending(member=3, why="other jobs use it"))
    assert not run.control.unheard


def test_a_restarted_controller_says_and_kills_nothing_that_is_on_record_as_gone() -> None:
    """It said every death again, and waited for a word about each."""
    plan = Scenario().begun().control.plans[1]
    run = Scenario()
    run.take(Resumed(plans=(plan,), spawned=((1, "a"), (2, "a"), (3, "a"), (4, "a")), gone=(2, 3, 4)))
    run.take(NodeSeen(node="a", capacity=4))
    for member in (3, 4):
        assert run.take(RankGone(member=member, why="it was gone")) == []
    assert run.report(1, 1) == [], "nobody has gone on without rank 2 yet: that is news"
    assert "create 2 unplanned from 1 of (1,)" in run.take(RankGone(member=2, why="it was gone"))


def test_a_restarted_controller_knows_what_must_have_formed() -> None:
    first = Scenario().begun()
    plan = first.control.plans[1]
    later = replace(plan, generation=2, base=1, kind="unplanned", joiners=())
    run = Scenario()
    run.take(Resumed(plans=(plan, later), spawned=((1, "a"), (2, "a"), (3, "b"))))
    run.take(NodeSeen(node="b", capacity=2))
    run.take(RankGone(member=1, why="not there"))
    run.take(RankGone(member=2, why="not there"))
    run.ready(3)
    run.report(3, 0)
    assert run.control.creating is None  # no new beginning
    (end,) = run.take(Tick(), after_s=3.0)
    assert end.startswith("end failed: lost rank 0")


def test_time_does_not_run_backwards() -> None:
    run = Scenario().begun()
    before = deepcopy(run.control)
    with pytest.raises(AssertionError):
        run.take(Tick(), after_s=-1.0)
    assert run.control == before


def test_resuming_twice_changes_nothing() -> None:
    run = Scenario().begun()
    with pytest.raises(AssertionError, match="resumed twice"):
        run.take(Resumed(plans=(), spawned=()))
    assert run.report(1, 1) == []


@pytest.mark.parametrize("detection_s", [0.5, 2.0, 7.0])
def test_all_times_follow_from_how_soon_a_death_is_to_be_found(detection_s: float) -> None:
    def times(detection_s: float) -> list[float]:
        limits = Limits(min_workers=1, max_workers=2, detection_s=detection_s)
        lost_s = [limits.lost_limit_s(some) for some in (False, True)]
        return [limits.settle_s, *lost_s, limits.reach_s, limits.stall_s, limits.resend_s, limits.start_together_s]

    settle_s, lost_s, absent_s, reach_s, stall_s, resend_s, together_s = times(detection_s)
    assert times(2 * detection_s) == [2 * each for each in times(detection_s)]
    assert max(settle_s, resend_s) < detection_s <= lost_s < reach_s < stall_s < min(absent_s, together_s)


def test_nodes_are_waited_for_while_nothing_is_starting() -> None:
    """Only more of them would help then; the time until ranks are ready is something else."""
    control = Control(limits=Limits(min_workers=2, max_workers=2))
    control.handle(NodeSeen(node="a", capacity=0), 0.0)
    assert control.waits
    spawned = control.handle(NodeSeen(node="a", capacity=2), 5.0)
    assert sum(isinstance(each, Spawn) for each in spawned) == 2 and not control.waits
    control.handle(Tick(), 9.0)
    assert control.chronicle.figures.spent.seconds["waiting"] == 5.0


def ended_differently(*verified: int, snapshots: bool = True, broken: bool = False) -> tuple[Scenario, list[str]]:
    """Three ranks, of which the second has returned with another state than the others. broken: a link was, so that
    another generation has been made, which nobody forms."""
    run = Scenario(limits=Limits(min_workers=1, max_workers=3, detection_s=2.0, snapshots=snapshots))
    run.take(NodeSeen(node="a", capacity=3))
    for member in (1, 2, 3):
        run.ready(member)
    run.take(GenerationCreated(generation=1))
    if broken:
        for member in (1, 2, 3):
            run.report(member, 1, step=2, complete=2, broken=1)
        assert run.take(Tick(), after_s=1.0) == ["create 2 unplanned from 1 of (1, 2, 3)"]
        run.take(GenerationCreated(generation=2))
    said = []
    for member, digest, known in zip((1, 2, 3), "aba", verified, strict=True):
        run.report(member, 1, step=3, complete=2, finished=True)
        objects = (("model", digest), ("optimizer", "c"))
        said = run.take(RankReturned(member=member, step=3, digest=digest, verified=known, objects=objects))
    return run, said


def test_ranks_that_end_with_different_states_compute_the_last_steps_again() -> None:
    run, said = ended_differently(1, 2, -1)
    spawned = ["spawn 4 on a", "spawn 5 on a", "spawn 6 on a"]
    assert said == ["kill 1", "kill 3", "kill 2", "take inventory", *spawned]
    assert run.control.deaths.failures.total == 1, "only the odd one is at fault"
    assert run.control.restoring.rollback is not None and run.control.restoring.rollback.back_to == 2


def test_different_ends_leave_nobody_with_the_odd_state_where_another_generation_was_to_form() -> None:
    run, said = ended_differently(1, 2, -1, broken=True)
    assert said[:4] == ["kill 1", "kill 3", "kill 2", "take inventory"]
    assert run.control.restoring.rollback is not None and run.control.restoring.rollback.back_to == 2


def test_the_last_steps_may_be_all_that_there_are() -> None:
    run, _ = ended_differently(0, 0, 0)
    assert run.control.restoring.rollback is not None and run.control.restoring.rollback.back_to == 0


@pytest.mark.parametrize(("verified", "snapshots"), [(-1, True), (2, False)])
def test_with_nothing_to_go_back_to_different_ends_end_the_run(verified: int, snapshots: bool) -> None:
    _, said = ended_differently(verified, verified, verified, snapshots=snapshots)
    assert len(said) == 1 and "came again" not in said[0]
    assert said[0].startswith("end failed: ranks ended with different states in model (digests a, b): something")


def test_a_rank_that_gets_no_place_is_tried_elsewhere_and_is_no_failure() -> None:
    run = Scenario(limits=Limits(min_workers=1, max_workers=2, detection_s=2.0, max_failures=0))
    assert run.take(NodeSeen(node="a", capacity=2)) == ["spawn 1 on a", "spawn 2 on a"]
    assert run.take(NodeSeen(node="a", capacity=1)) == []
    assert run.take(NodeSeen(node="b", capacity=1)) == []
    assert run.take(RankPending(member=2, why="node a is full")) == ["kill 2", "spawn 3 on b"]
    assert run.take(RankPending(member=2, why="node a is full")) == []
    run.ready(1, "a")
    assert run.take(RankPending(member=1, why="too late")) == [], "it has begun"
