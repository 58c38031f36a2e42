"""Lines of steps on record: of two controllers, the one that was overtaken changes nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors import launch
from resilient.core.plan import Address, Place, Plan, Restore
from resilient.ledger import Ledger
from snapshot.core.branches import Branch
from snapshot.core.inventory import SnapshotKey
from tests.cluster_keys import keys_in_memory


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    return keys_in_memory(monkeypatch)


def ledger(attempt: int, run: str = "run") -> Ledger:
    job: Any = SimpleNamespace(key=f"{run}/{attempt}", attempt=attempt, settings=SimpleNamespace(name=run))
    return Ledger(job)


def plan(generation: int, *at_steps: int) -> Plan:
    """With a branch more for each of these steps."""
    opened = (Branch(number=number + 1, parent=number, at_step=step) for number, step in enumerate(at_steps))
    return Plan(
        generation=generation,
        base=0,
        kind="initial",
        places=(Place(member=1, node="a", address=Address(host="h", port=1)),),
        leaves=((0,),),
        micro_batches=1,
        joiners=(),
        reason="",
        branches=(Branch(number=0), *opened),
    )


def steps_on_record(found: Ledger) -> list[int]:
    lineage = found.lineage()
    return [] if lineage is None else [branch.at_step for branch in lineage.branches[1:]]


def test_a_controller_of_an_earlier_attempt_that_goes_on_overwrites_nothing(keys: dict[str, bytes]) -> None:
    old, new, next_one = ledger(1), ledger(2), ledger(3)
    assert old.create(plan(4, 10), "old") and steps_on_record(new) == [10]
    assert new.create(plan(1, 10, 30), "new")
    assert old.create(plan(5, 10, 20), "old"), "its own generations are its own"
    assert steps_on_record(next_one) == [10, 30]
    old.close(keep_lineage=False)
    assert steps_on_record(next_one) == [10, 30]


def test_nor_does_one_of_the_same_attempt(keys: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was stopped after its generation was created, and before it had written anything else."""
    stopped, new = ledger(1), ledger(1)
    create, later = launch.create_key, []

    def stops(key: str, value: bytes, creator: str = "") -> bool:
        if key.startswith("lineage/"):
            later.append((key, value))
            return True
        return create(key, value, creator)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "create_key", stops)
        assert stopped.create(plan(4, 10), "stopped")
    assert new.create(plan(5, 10, 20), "new")
    launch.create_key(*later[0])
    assert steps_on_record(ledger(2)) == [10, 20]


def test_lines_are_dropped_with_their_run_alone(keys: dict[str, bytes]) -> None:
    ledger(1, "gpt").create(plan(1, 10), "x")
    ledger(1, "gpt2").create(plan(1, 20), "x")
    ledger(2, "gpt").create(plan(1, 10, 30), "x")
    assert len([key for key in keys if key.startswith("lineage/gpt/")]) == 1
    ledger(2, "gpt").close(keep_lineage=False)
    assert steps_on_record(ledger(3, "gpt")) == [] and steps_on_record(ledger(2, "gpt2")) == [20]


def test_a_line_that_an_earlier_version_has_recorded_is_read(keys: dict[str, bytes]) -> None:
    keys["lineage/run"] = plan(1, 10).to_json().encode()
    assert steps_on_record(ledger(2)) == [10]
    ledger(2).close(keep_lineage=False)
    assert steps_on_record(ledger(3)) == []


def test_plans_that_no_restart_needs_are_emptied_and_their_numbers_stay_taken(keys: dict[str, bytes]) -> None:
    found = ledger(1)
    for number in range(1, 1001):
        made = replace(plan(number), base=max(0, number - 2))
        if number in (3, 500):
            made = replace(made, kind="restored", restore=restored(number))
        assert found.create(made, "x")
    assert len(found.plans()) == 5, "those that went back, the last formed one, and what came from it"
    assert [each.generation for each in ledger(1).plans()] == [3, 500, 998, 999, 1000]
    assert sum(map(len, keys.values())) < 10_000
    assert found.has_generation(2) and not ledger(1).create(plan(2), "another")


def test_a_restarted_controller_goes_on_emptying(keys: dict[str, bytes]) -> None:
    for number in (1, 2):
        ledger(1).create(plan(number), "x")
    after = ledger(1)
    assert len(after.plans()) == 2
    after.create(replace(plan(3), base=2), "x")
    assert [each.generation for each in after.plans()] == [2, 3]


def restored(generation: int) -> Restore:
    return Restore(key=SnapshotKey(attempt=1, branch=0, generation=generation, step=7))
