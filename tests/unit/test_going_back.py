"""From memory to storage, as transcripts: what is asked when, what is gone on from, what is said when nothing is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from resilient.core.control import Control
from resilient.core.events import GenerationCreated, RankGone, StorageSeen, Tick
from resilient.core.instructions import End, LookAtStorage
from resilient.core.plan import Plan, first_branch
from resilient.core.storage import Storage
from snapshot.core.branches import Branch, Lineage
from snapshot.core.inventory import CheckpointFound, Inventory
from tests.unit.test_restoring_core import LIMITS, Scenario, found, key, kinds, only, plan_of

STORED = replace(LIMITS, checkpoints=True)


def stored(step: int, *, attempt: int = 1, branch: int = 0, lineage: Lineage | None = None) -> CheckpointFound:
    this = replace(key(step), attempt=attempt, branch=branch)
    return CheckpointFound(key=this, lineage=lineage or first_branch(), folder=f"{attempt}/{branch}/{step}")


class Stage(Scenario):
    """With checkpoints on storage."""

    def resume(self, how: Any, attempt: int = 1) -> Stage:
        self.control = Control(limits=STORED, attempt=attempt, resume=how)
        return self

    def listing(self, *checkpoints: CheckpointFound, error: str = "") -> tuple[Any, ...]:
        asked = [one.asked for one in self.said if isinstance(one, LookAtStorage)][-1]
        return self.take(StorageSeen(asked=asked, checkpoints=checkpoints, error=error))


def begun() -> Stage:
    """Two ranks train; no keeper holds anything yet."""
    run = Stage(limits=STORED).resume("auto")
    run.nodes()
    run.ready(1, 2)
    run.listing()
    plan = plan_of(run.answer(Inventory(keeper="a"), Inventory(keeper="b")))
    run.take(GenerationCreated(generation=plan.generation))
    run.report(1, 1, complete=7)
    run.report(2, 1, complete=7)
    return run


def all_lost() -> Stage:
    run = begun()
    run.take(RankGone(member=1, why="killed"))
    run.take(GenerationCreated(generation=2))
    run.take(RankGone(member=2, why="killed"))
    run.ready(3, 4)
    return run


def nothing_in_memory(run: Stage) -> Stage:
    """All keepers have answered, and had their time."""
    run.answer(Inventory(keeper="a"), Inventory(keeper="b"))
    run.take(Tick(), after_s=3.0)
    run.answer(Inventory(keeper="a"), Inventory(keeper="b"))
    return run


def step_6_in_part(run: Stage) -> Stage:
    """Step 4 can be read; of step 6 only one node's image is left."""
    whole, part = found("a", 4), found("a", 6)
    run.answer(replace(whole, images=(*whole.images, *part.images)), found("b", 4))
    assert run.control.restoring.elected is not None and run.control.restoring.elected.passed_over
    return run


def end_of(out: tuple[Any, ...]) -> str:
    end = cast(End, only(out, End))
    assert end.outcome == "failed"
    return end.reason


def from_storage(plan: Plan, checkpoint: CheckpointFound) -> bool:
    return plan.restore is not None and plan.restore.folder == checkpoint.folder


def test_the_beginning_looks_at_both_and_begins_at_0_where_there_is_nothing() -> None:
    run = begun()
    assert run.control.formed is not None and run.control.formed.kind == "initial"


def test_memory_comes_first_and_storage_is_not_asked() -> None:
    run = all_lost()
    before = len(run.said)
    plan = plan_of(run.answer(found("a", 4), found("b", 4)))
    assert plan.restore is not None and not plan.restore.folder
    assert not [one for one in run.said[before:] if isinstance(one, LookAtStorage)]


def test_storage_is_gone_on_from_when_no_keeper_can_give_anything() -> None:
    run = all_lost()
    run.answer(found("a", 4, bad=True), Inventory(keeper="b"))
    run.take(Tick(), after_s=3.0)
    run.answer(found("a", 4, bad=True), Inventory(keeper="b"))
    plan = plan_of(run.listing(stored(2), stored(3), stored(9, attempt=2)))
    assert from_storage(plan, stored(3)), "a later attempt's are not this one's to take"
    assert "is on storage" in plan.reason and "can be read" in plan.reason


def test_a_checkpoint_that_is_newer_than_what_memory_still_has() -> None:
    run = step_6_in_part(all_lost())
    assert from_storage(plan_of(run.listing(stored(2), stored(5))), stored(5))


def test_memory_that_has_nothing_of_the_last_generation_may_be_older_than_storage() -> None:
    """Whoever had newer snapshots has gone, and those that are left know nothing of them."""
    run = begun()
    run.take(RankGone(member=1, why="killed"))
    run.take(GenerationCreated(generation=2))
    run.report(2, 2, complete=90)
    run.take(RankGone(member=2, why="killed"))
    run.ready(3, 4)
    assert "CreateGeneration" not in kinds(run.answer(found("a", 4), found("b", 4)))
    assert from_storage(plan_of(run.listing(stored(80))), stored(80))


def test_a_run_submitted_again_goes_on_from_storage_if_that_is_newer_than_memory() -> None:
    run = Stage(limits=STORED).resume("auto", attempt=2)
    run.nodes()
    run.ready(1, 2)
    run.listing(stored(80))
    assert from_storage(plan_of(run.answer(found("a", 4), found("b", 4))), stored(80))


def test_memory_is_gone_on_from_when_storage_does_not_answer() -> None:
    run = step_6_in_part(all_lost())
    plan = plan_of(run.listing(error="away"))
    assert plan.restore is not None and plan.restore.key.step == 4


def test_memory_is_gone_on_from_when_storage_says_nothing() -> None:
    run = step_6_in_part(all_lost())
    assert "CreateGeneration" not in kinds(run.take(Tick(), after_s=1.0))
    plan = plan_of(run.take(Tick(), after_s=1.5))
    assert plan.restore is not None and plan.restore.key.step == 4


def test_a_beginning_that_storage_says_nothing_about_ends_with_an_error() -> None:
    run = Stage(limits=STORED).resume("auto")
    run.nodes()
    run.ready(1, 2)
    assert "End" not in kinds(run.take(Tick(), after_s=61.0))
    assert "it has not answered within 60 s" in end_of(run.take(Tick(), after_s=61.0))


def not_restored(run: Stage, plan: Plan, *, killed: bool) -> Plan:
    """The plan that follows on one that could not be restored: because its ranks have died, or could not read it."""
    run.take(GenerationCreated(generation=plan.generation))
    if killed:
        for member in plan.members:
            run.take(RankGone(member=member, why="killed"))
        run.ready(run.control.next_member, run.control.next_member + 1)
    else:
        run.report(plan.members[0], plan.generation, formed=0, broken=plan.generation)
        run.take(Tick(), after_s=1.0)
    nothing_in_memory(run)
    return plan_of(run.listing(stored(2), stored(3)))


def test_a_checkpoint_that_can_not_be_read_gives_way_to_an_older_one() -> None:
    run = nothing_in_memory(all_lost())
    plan = plan_of(run.listing(stored(2), stored(3)))
    for _ in range(2):
        assert from_storage(plan, stored(3))
        plan = not_restored(run, plan, killed=False)
    assert from_storage(plan, stored(2))


def test_a_checkpoint_is_not_given_up_for_deaths_alone_before_there_have_been_many() -> None:
    """One of the deaths, and one time at which it could not be read, are not two times at which it could not be."""
    run = nothing_in_memory(all_lost())
    plan = not_restored(run, plan_of(run.listing(stored(2), stored(3))), killed=False)
    for _ in range(5):
        assert from_storage(plan, stored(3))
        plan = not_restored(run, plan, killed=True)
    assert from_storage(plan, stored(2))


def test_failures_to_read_a_checkpoint_are_forgotten_when_one_was_read() -> None:
    """Two on one day of a run and another weeks later say nothing about the file."""
    checkpoint = stored(3)
    storage = Storage(attempt=1, checkpoints=(checkpoint,))
    for counts in (storage.unread, storage.deaths):
        counts[checkpoint.folder] = 9
        assert storage.newest(None) is None
        storage.restored()
        assert storage.newest(None) == checkpoint


def test_nothing_anywhere_is_said() -> None:
    run = nothing_in_memory(all_lost())
    reason = end_of(run.listing())
    assert "there is no checkpoint of it on storage" in reason and "no keeper holds a snapshot" in reason


def test_storage_that_never_answers_ends_the_run_after_a_while_and_not_before() -> None:
    run = nothing_in_memory(all_lost())
    for _ in range(14):
        assert "End" not in kinds(run.listing(error="connection refused"))
        assert "End" not in kinds(run.take(Tick(), after_s=4.0))
        assert "End" not in kinds(run.answer(Inventory(keeper="a"), Inventory(keeper="b")))
    run.listing(error="connection refused")
    run.take(Tick(), after_s=4.0)
    reason = end_of(run.answer(Inventory(keeper="a"), Inventory(keeper="b")))
    assert "connection refused" in reason and "can't be listed" in reason


def test_a_new_cluster_goes_on_from_storage_with_the_branches_that_are_written_there() -> None:
    lineage = Lineage(branches=(Branch(number=0), Branch(number=1, parent=0, at_step=3, skipped=(4,))))
    run = Stage(limits=STORED).resume("auto", attempt=3)
    run.nodes()
    run.ready(1, 2)
    run.answer(Inventory(keeper="a"), Inventory(keeper="b"))
    newest = stored(5, branch=1, lineage=lineage)
    plan = plan_of(run.listing(stored(9), newest))
    assert from_storage(plan, newest) and plan.branches == lineage.branches and plan.base == 0


def test_never_begins_at_0_and_leaves_older_snapshots_alone() -> None:
    run = Stage(limits=STORED).resume("never", attempt=2)
    run.nodes()
    run.ready(1)
    assert plan_of(run.ready(2)).kind == "initial"
    assert run.control.restoring.not_before == 2


def test_a_step_begins_a_branch_of_its_own_there() -> None:
    run = Stage(limits=STORED).resume(4, attempt=2)
    run.nodes()
    run.ready(1, 2)
    plan = plan_of(run.listing(stored(4), stored(8)))
    assert from_storage(plan, stored(4))
    assert plan.branches[-1] == Branch(number=1, parent=0, at_step=4)


def test_a_step_that_is_not_there_is_said_with_those_that_are() -> None:
    run = Stage(limits=STORED).resume(5, attempt=2)
    run.nodes()
    run.ready(1, 2)
    assert "resume=5" in (reason := end_of(run.listing(stored(4), stored(8)))) and "4, 8" in reason
