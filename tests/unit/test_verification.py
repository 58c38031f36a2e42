"""States are compared between ranks: what a digest sees, whom the ranks believe, what the controller does about it."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resilient.core.control import Control
from resilient.core.difference import odd_ones, rollback_after, rollback_after_move
from resilient.core.events import GenerationCreated, NodeSeen, RankGone, RankReady, RankReported, Tick
from resilient.core.instructions import CreateGeneration, End, Instruction, Kill, TakeInventory
from resilient.core.lane import NOBODYS, Agreed, AgreedLane, StepLane, Wish
from resilient.core.limits import Limits
from resilient.core.plan import Address, Plan
from resilient.core.rollbacks import Rollbacks
from resilient.core.seat import Rollback, SeatReport
from resilient.verification import Digests, StateDigest, weighted_sum
from snapshot.capture import capture
from snapshot.core.lifecycle import Ordinal
from snapshot.recapture import Recapture
from tests.unit.test_rank_snapshots import Training


def flip(tensor: Tensor, byte: int = 0) -> None:
    """One bit, as a broken memory would: torch knows nothing of it."""
    address = tensor.data_ptr() + byte
    ctypes.memset(address, ctypes.c_uint8.from_address(address).value ^ 1, 1)


# The digest


def objects() -> dict[str, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3, 5)).square().mean().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "values": {"seen": 3}}


def test_equal_states_have_equal_digests_however_they_were_captured() -> None:
    one, other, digests, again = objects(), objects(), Digests(), Recapture()
    full = Digests().begin(capture(one)).finish()
    assert {digests.begin(again.capture(other)).finish() for _ in range(3)} == {full}


@pytest.mark.parametrize("which", range(11))
def test_a_flipped_bit_anywhere_shows(which: int) -> None:
    state, recapture, digests = objects(), Recapture(), Digests()
    before = digests.begin(recapture.capture(state)).finish()
    table = recapture.capture(state)
    tensor = table.tensors[which % len(table.tensors)]
    flip(tensor, tensor.nbytes - 1)
    assert digests.begin(recapture.capture(state)).finish() != before
    flip(tensor, tensor.nbytes - 1)
    assert digests.begin(recapture.capture(state)).finish() == before


def test_a_state_whose_memory_has_moved_is_read_where_it_is_now() -> None:
    state, recapture, digests = objects(), Recapture(), Digests()
    before = digests.begin(recapture.capture(state)).finish()
    model = state["model"]
    assert isinstance(model, nn.Module)
    model.share_memory()
    assert digests.begin(recapture.capture(state)).finish() == before
    flip(next(model.parameters()))
    assert digests.begin(recapture.capture(state)).finish() != before


def test_what_moves_during_forward_is_read_at_once() -> None:
    state, digests = objects(), Digests()
    table = Recapture().capture(state)
    expected = digests.begin(table).finish()
    begun = Digests().begin(table)
    model = state["model"]
    assert isinstance(model, nn.Module)
    model(torch.ones(4, 5))
    assert begun.finish() == expected


def test_the_sum_used_on_devices_sees_every_element_and_where_it_stands() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.float64):
        tensor = torch.arange(1, 1001).to(dtype)
        expected = weighted_sum(tensor)
        assert weighted_sum(tensor.clone()) == expected
        assert weighted_sum(tensor.flip(0)) != expected
        flip(tensor, tensor.nbytes - 1)
        assert weighted_sum(tensor) != expected
    assert weighted_sum(torch.empty(0)) == 0


def test_a_snapshot_brings_the_digest_of_its_state_into_the_lane(tmp_path: Path) -> None:
    training = Training(tmp_path / "one")
    training.ready()
    while training.step() is None:
        pass
    wish = training.snapshots.wish(Ordinal(0, training.steps + 1), 1)
    assert wish.digest == Digests().begin(capture(training.objects)).finish()
    assert training.snapshots.wish(Ordinal(0, training.steps + 2), 1).digest is None, "of another step"
    training.snapshots.agreed(Ordinal(0, training.steps + 1), Agreed.of(wish.lane()))
    assert training.snapshots.verified(branch=0) == training.steps == training.snapshots.tally.verified
    assert training.snapshots.verified(branch=1) == -1


def test_when_states_differ_nothing_else_of_the_lane_counts(tmp_path: Path) -> None:
    training = Training(tmp_path / "one")
    training.ready()
    everywhere = Ordinal(0, 99).packed()
    low = [min(pair) for pair in zip(*(Wish(protected=everywhere, digest=d).lane() for d in (5, 6)), strict=True)]
    training.snapshots.agreed(Ordinal(0, 3), Agreed.of(low))
    assert training.snapshots.tally.protected != 99


# Whom to believe


@pytest.mark.parametrize(
    ("digests", "odd"),
    [
        ([7, 7, 8], (2,)),
        ([8, 7, 7, 9, 7], (0, 3)),
        ([7, 8], ()),
        ([7, 7, 8, 8], ()),
        ([NOBODYS, 7, 8, 7], (2,)),
        ([NOBODYS, 7, 8], ()),
    ],
)
def test_the_odd_ones(digests: list[int], odd: tuple[int, ...]) -> None:
    assert odd_ones(digests) == odd


def test_the_lane_compares_only_those_who_have_captured() -> None:
    def agreed(*digests: int | None) -> Agreed:
        return Agreed.of([min(words) for words in zip(*(Wish(digest=d).lane() for d in digests), strict=True)])

    assert agreed(5, 5, None).verified and not agreed(5, 5, None).differs
    assert agreed(5, 6, None).differs and not agreed(5, 6, None).verified
    assert not agreed(None, None).verified and not agreed(None, None).differs


OWN = StepLane(newest=3, control=5, buffers=6, layout=7, mask=8, spelled_anew=False, wish=Wish())


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({}, []),
        ({"control": 4}, ["control_differs"]),
        ({"buffers": 9}, ["layouts_differ"]),
        ({"layout": 9}, ["layouts_differ"]),
        ({"mask": 9}, ["masks_differ"]),
        ({"mask": None}, ["masks_differ"]),
        ({"spelled_anew": True}, ["spell"]),
    ],
)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_what_ranks_compare_in_every_exchange(other: dict[str, Any], found: list[str], stages: int) -> None:
    rows = [OWN.row(stage, stages) for stage in range(stages)] + [replace(OWN, **other).row(stages - 1, stages)]
    agreed = AgreedLane.of([min(words) for words in zip(*rows, strict=True)], stages)
    assert agreed.newest == 3
    assert [
        name for name in ("control_differs", "layouts_differ", "masks_differ", "spell") if getattr(agreed, name)
    ] == found


def test_layouts_and_masks_are_those_of_a_stage() -> None:
    rows = [OWN.row(0, 2), replace(OWN, layout=9, mask=1, newest=2).row(1, 2)]
    agreed = AgreedLane.of([min(words) for words in zip(*rows, strict=True)], 2)
    assert (agreed.newest, agreed.layouts_differ, agreed.masks_differ) == (2, False, False)


# What the controller does


class Team:
    """Ranks 1, 2 and 3 on nodes a, b and c, generation 1 formed."""

    def __init__(self, max_failures: int | None = None) -> None:
        limits = Limits(min_workers=1, max_workers=3, snapshots=True, detection_s=2.0, max_failures=max_failures)
        self.control = Control(limits=limits)
        self.now, self.serial = 0.0, 0
        for node in "abc":
            self.take(NodeSeen(node=node, capacity=1))
        for member, node in ((1, "a"), (2, "b"), (3, "c")):
            self.ready(member, node)
        self.take(GenerationCreated(generation=1))
        for member in (1, 2, 3):
            self.report(member, 1, 1)

    @property
    def plan(self) -> Plan:
        assert self.control.current is not None
        return self.control.current

    def take(self, event: object) -> tuple[Instruction, ...]:
        self.now += 0.01
        return self.control.handle(event, self.now)  # type: ignore[arg-type]

    def ready(self, member: int, node: str) -> tuple[Instruction, ...]:
        address = Address(host=node, port=member)
        ready = RankReady(
            member=member, node=node, address=address, micro_batches=6, steps=9, probe="p", probe_fields="f"
        )
        return self.take(ready)

    def report(
        self, member: int, generation: int, formed: int, rollback: Rollback | None = None
    ) -> tuple[Instruction, ...]:
        self.serial += 1
        report = SeatReport(
            member=member,
            generation=generation,
            formed=formed,
            broken=0,
            step=4,
            complete=3,
            finished=False,
            waiting=False,
            rollback=rollback,
            serial=self.serial,
        )
        return self.take(RankReported(report=report))


def test_who_stands_against_the_majority_is_replaced_and_all_go_back() -> None:
    team = Team()
    wanted = rollback_after(team.plan, 4, [7, 8, 7], verified=3)
    assert wanted.back_to == 3 and "rank 1 (node b)" in wanted.why
    out = team.report(1, 1, 1, wanted)
    assert [item.member for item in out if isinstance(item, Kill)] == [2]
    assert any(isinstance(item, TakeInventory) for item in out)
    assert not any(isinstance(item, Kill) for item in team.report(3, 1, 1, wanted)), "once"
    assert team.control.membership.avoided == {"b"}, "its memory or processor may do it again"


def test_what_the_suspect_has_told_itself_is_not_forgotten_with_it() -> None:
    """The others may not have learned who differs before it was killed, nor that anybody does."""
    team = Team()
    out = team.report(2, 1, 1, rollback_after(team.plan, 4, [7, 8, 7], verified=3))
    assert [item.member for item in out if isinstance(item, Kill)] == [2]
    assert any(isinstance(item, TakeInventory) for item in out)
    for out in (team.take(Tick()), team.report(1, 1, 1), team.report(3, 1, 1)):
        assert not any(isinstance(item, CreateGeneration) for item in out), "with what it may have damaged"


def test_whose_layers_differ_as_they_are_to_move_is_replaced_before_the_generation_has_formed() -> None:
    """The others have adopted its plan by then, with somebody who joins."""
    team = Team()
    team.take(RankGone(member=3, why="test"))
    team.take(GenerationCreated(generation=2))
    for member in (1, 2):
        team.report(member, 2, 2)
    team.ready(4, "c")
    team.take(GenerationCreated(generation=3))
    assert team.plan.members == (1, 2, 4)
    wanted = rollback_after_move(team.plan, 4, {"layer 0": {0: 7, 1: 8, 2: 7}}, verified=3)
    assert wanted.suspects == (2,)
    assert "rank 1 (node b) had other bytes of layer 0 at the start of step 4 than the majority" in wanted.why
    out = team.report(1, 3, 2, wanted)
    assert [item.member for item in out if isinstance(item, Kill)] == [2]
    assert any(isinstance(item, TakeInventory) for item in out)


def test_of_holders_without_a_majority_nobody_is_blamed() -> None:
    plan = Team().plan
    wanted = rollback_after_move(plan, 4, {"layer 0": {0: 7, 2: 8}, "layer 1": {0: 1, 1: 2, 2: 1}}, verified=-1)
    assert wanted.suspects == (plan.members[1],), "of layer 1 it is known"
    wanted = rollback_after_move(plan, 4, {"layer 0": {0: 7, 2: 8}}, verified=3)
    assert wanted.suspects == () and "ranks 0, 2 had different bytes of layer 0" in wanted.why


def test_a_rank_that_is_replaced_for_its_bits_counts_as_a_failure() -> None:
    team = Team(max_failures=0)
    out = team.report(1, 1, 1, rollback_after(team.plan, 4, [7, 8, 7], verified=3))
    (end,) = (item for item in out if isinstance(item, End))
    assert "max_failures=0" in end.reason and "rank 1 (node b)" in end.reason


def test_without_a_majority_nobody_is_blamed() -> None:
    team = Team()
    out = team.report(1, 1, 1, rollback_after(team.plan, 4, [7, 8, NOBODYS], verified=3))
    assert not any(isinstance(item, Kill) for item in out)
    assert any(isinstance(item, TakeInventory) for item in out)


def test_a_rollback_is_not_held_up_by_a_joiner_that_waits_for_the_next_exchange() -> None:
    team = Team()
    team.take(RankGone(member=3, why="test"))
    team.take(GenerationCreated(generation=2))
    for member in (1, 2):
        team.report(member, 2, 2)
    (create,) = (item for item in team.ready(4, "c") if isinstance(item, CreateGeneration))
    assert create.plan.kind == "planned"
    team.take(GenerationCreated(generation=3))
    wanted = Rollback(back_to=3, skip_from=0, skip_to=-1, why="test")
    assert any(isinstance(item, TakeInventory) for item in team.report(1, 2, 2, wanted))


def test_what_was_asked_for_before_the_last_restore_is_done() -> None:
    """Ranks that have gone back may not have told so yet."""
    wanted = Rollback(back_to=3, skip_from=0, skip_to=-1, why="test")
    report = SimpleNamespace(rollback=wanted, generation=4)
    membership = SimpleNamespace(
        tally=lambda plan: SimpleNamespace(numbers=lambda what: {1}), members={1: SimpleNamespace(report=report)}
    )
    plan = SimpleNamespace(since=5, branch=2, kind="restored")
    control: Any = SimpleNamespace(formed=plan, current=plan, membership=membership)
    rollbacks = Rollbacks(control=control)
    assert rollbacks.wanted() is None
    report.generation = 5
    assert rollbacks.wanted() == wanted


def test_a_rollback_waits_for_a_generation_that_is_reached_without_an_exchange() -> None:
    team = Team()
    team.take(RankGone(member=3, why="test"))
    team.take(GenerationCreated(generation=2))
    wanted = Rollback(back_to=3, skip_from=0, skip_to=-1, why="test")
    assert not any(isinstance(item, TakeInventory) for item in team.report(1, 1, 1, wanted))
    assert any(isinstance(item, TakeInventory) for item in team.report(2, 2, 2))


def test_a_digest_that_fails_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may have no memory left for it; training would wait for this copy for ever."""
    training = Training(tmp_path / "run")
    training.ready()

    def out_of_memory(self: StateDigest) -> int:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(StateDigest, "finish", out_of_memory)
    assert training.step() is not None
    copy = training.snapshots._copy
    assert copy is not None and copy.done.wait(10.0), "the copying thread has ended"
    assert copy.digest is None and "out of memory" in training.said[-1]
    assert training.snapshots.tally.torn == 0
