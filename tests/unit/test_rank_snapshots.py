"""A rank's snapshots: what lies in the slots, what training waits for, and what is given up."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from actors.ring import Ring
from actors.standing import StandingFile, show_settled
from actors.vault import Vault
from resilient.copying import Copy
from resilient.core.cadence import Cadence
from resilient.core.lane import Agreed
from resilient.core.saves import Saves
from resilient.snapshots import Seating, Snapshots
from resilient.verification import Digests
from snapshot.absent import hold_parts, release
from snapshot.arena import NoRoom, Slot, SlotHead, SlotView, find_slots
from snapshot.capture import capture
from snapshot.core.inventory import SnapshotKey
from snapshot.core.lifecycle import Ordinal
from snapshot.core.ranges import Ranges, merged
from snapshot.core.stripes import Group
from snapshot.load import load
from snapshot.table import StateTable
from tests.stages import bytes_in, small_chunks
from tests.vaults import wait_for

ALONE = Seating(generation=1, rank=0, world=1)


class Training:
    """A model that trains by itself, and its snapshots."""

    def __init__(self, folder: Path, width: int = 16, saves: Saves | None = None, every: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.said: list[str] = []
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.values: dict[str, Any] = {"seen": 0, "history": torch.zeros(3)}
        self.saves, self.every = saves, every
        self.snapshots = self.new(member=1)
        self.steps = 0

    def new(self, member: int) -> Snapshots:
        return Snapshots(
            run="r",
            attempt=1,
            folder=self.folder,
            member=member,
            device=torch.device("cpu"),
            cadence=Cadence(every=self.every, budget=0.02),
            say=self.said.append,
            saves=self.saves,
        )

    @property
    def objects(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer, "values": self.values}

    def compute(self) -> None:
        self.model(torch.randn(4, 16)).square().mean().backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.values["seen"] += 1
        self.values["history"][0] += 1.0
        self.steps += 1

    def step(self, *, seating: Seating = ALONE) -> StateTable | None:
        """One step as the loop takes it. The state as it was when a snapshot of it was taken, if one was."""
        wish = self.snapshots.wish(Ordinal(0, self.steps + 1), seating.generation)
        agreed = Agreed.of(wish.lane())
        self.snapshots.agreed(Ordinal(0, self.steps + 1), agreed)
        self.compute()
        self.snapshots.gate()
        self.update()
        copy = copied(capture(self.objects)) if agreed.capture else None
        self.snapshots.boundary(
            Ordinal(0, self.steps), self.objects, seating, wanted=agreed.capture, durable=agreed.save
        )
        return copy

    def ready(self) -> None:
        """Until its slots have been made."""
        self.step()
        wait_for(lambda: self.snapshots.wish(Ordinal(0, self.steps + 1), 1).room and made_or_full(self.snapshots))


def is_ready(snapshots: Snapshots, step: int) -> bool:
    return snapshots.wish(Ordinal(0, step), 1).room


def is_protected(snapshots: Snapshots, step: int, ordinal: int) -> bool:
    return snapshots.wish(Ordinal(0, step), 1).protected >= ordinal


def made_or_full(snapshots: Snapshots) -> bool:
    """Whether nothing is being prepared."""
    return not snapshots._slots.preparing


def copied(table: StateTable) -> StateTable:
    fresh = StateTable.empty(table.skeleton)
    for target, source in zip(fresh.pieces(0, table.nbytes), table.pieces(0, table.nbytes), strict=True):
        target.copy_(source)
    return fresh


def in_slots(folder: Path) -> dict[int, bytes]:
    """The payload of every committed slot, by step."""
    found = {}
    for slot in find_slots(folder):
        if slot.state in ("committed", "sealed"):
            view = SlotView.open(slot.path)
            found[view.head().step] = bytes(view.payload)
            view.close()
    return found


def payload_of(table: StateTable) -> bytes:
    return table.skeleton + b"".join(piece.numpy().tobytes() for piece in table.pieces(0, table.nbytes))


@pytest.fixture
def training(tmp_path: Path) -> Training:
    torch.manual_seed(0)
    return Training(tmp_path / "run")


@pytest.fixture
def kept(training: Training) -> Iterator[Training]:
    """With a keeper on a node of its own, which protects at once."""
    vault = Vault(run="r", attempt=1, node="a", folder=training.folder, secret="s", ip="127.0.0.1")
    vault.ring(Ring(generation=1, group=Group(nodes=("a",), parity=0), shares={"a": (0,)}))
    yield training
    vault.close()


def test_slots_hold_the_state_bit_by_bit_whatever_happens_to_it_afterwards(training: Training) -> None:
    training.ready()
    states = {}
    for _ in range(3):
        state = training.step()
        assert state is not None
        states[training.steps] = payload_of(state)
    training.snapshots.gate()
    with torch.no_grad():  # the gate is open: everything may change
        for tensor in [*training.model.state_dict().values(), training.values["history"]]:
            tensor.fill_(7)
    assert in_slots(training.folder) == states


def test_what_is_in_a_slot_can_be_loaded(training: Training, tmp_path: Path) -> None:
    training.ready()
    state = training.step()
    assert state is not None
    training.snapshots.gate()
    payload = in_slots(training.folder)[training.steps]
    table = StateTable.empty(payload[: len(state.skeleton)])
    at = len(state.skeleton)
    for piece in table.pieces(0, table.nbytes):
        piece.copy_(torch.frombuffer(bytearray(payload[at : at + piece.numel()]), dtype=torch.uint8))
        at += piece.numel()
    other = Training(tmp_path / "other")
    load(other.objects, table)
    assert capture(other.objects).digest() == state.digest()


def test_shares_of_all_ranks_are_together_the_state(training: Training) -> None:
    world, state = 3, None
    others = [training.snapshots, training.new(member=2), training.new(member=3)]
    for _ in range(2):
        training.compute()
        training.update()
        for rank, snapshots in enumerate(others):
            wanted = snapshots._slots.made > 0
            wait_for(functools.partial(is_ready, snapshots, training.steps) if wanted else lambda: True)
            seating = Seating(generation=1, rank=rank, world=world)
            snapshots.boundary(Ordinal(0, training.steps), training.objects, seating, wanted=wanted)
        state = capture(training.objects)
        for snapshots in others:
            snapshots.gate()
    assert state is not None
    shares = {
        found.head.rank: found.head
        for found in find_slots(training.folder)
        if found.state == "committed" and found.head
    }
    assert sorted(shares) == [0, 1, 2]
    assert merged(each for rank in range(3) for each in shares[rank].ranges) == ((0, state.nbytes),)
    assert sum(shares[rank].share_bytes for rank in range(3)) == state.nbytes


def chunks_of(owner: int) -> Callable[[StateTable], Ranges]:
    """Every other chunk."""
    return lambda table: merged(list(itertools.pairwise((0, *table.chunk_ends())))[owner::2])


def captured(snapshots: Snapshots, training: Training, rank: int) -> dict[int, tuple[SlotHead, bytes]]:
    """What this rank captures of every other chunk, twice. By step, from its slots."""
    for _ in range(3):
        training.compute()
        snapshots.gate()
        training.update()
        wanted = snapshots._slots.made > 0
        wait_for(functools.partial(is_ready, snapshots, training.steps) if wanted else lambda: True)
        seating = Seating(generation=1, rank=rank, world=2)
        ordinal, share = Ordinal(0, training.steps), chunks_of(rank)
        snapshots.boundary(ordinal, training.objects, seating, wanted=wanted, ranges=share)
    snapshots.gate()
    views = [SlotView.open(slot.path) for slot in find_slots(training.folder) if slot.state == "committed"]
    return {view.head().step: (view.head(), bytes(view.payload)) for view in views}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_captures_the_ranges_that_it_is_told(training: Training, rank: int) -> None:
    head, payload = captured(training.snapshots, training, rank)[3]
    table = capture(training.objects)
    assert head.ranges == chunks_of(rank)(table) and len(head.ranges) > 3
    pieces = [piece for start, stop in head.ranges for piece in table.pieces(start, stop)]
    assert payload == table.skeleton + b"".join(piece.numpy().tobytes() for piece in pieces)


def with_parts(training: Training) -> Tensor:
    """The last layer is on another rank, and of its optimizer state all but the second half of one tensor, which is
    given."""
    last, state = training.model[2], training.optimizer.state
    squares = state[last.weight]["exp_avg_sq"]
    half = squares.view(-1)[8:].clone()
    release(*last.parameters(), *(tensor for each in last.parameters() for tensor in state[each].values()))
    hold_parts(squares, [(8, half)])
    return half


def boundary_with_parts(training: Training, step: int) -> Ranges:
    """Captures all that is held, once there is room."""
    wait_for(lambda: is_ready(training.snapshots, step))
    held = capture(training.objects).held_ranges()
    training.snapshots.boundary(Ordinal(0, step), training.objects, ALONE, wanted=True, ranges=lambda _: held)
    return held


def test_what_a_rank_does_not_hold_need_not_be_in_its_memory(training: Training) -> None:
    with small_chunks(8):
        training.ready()
        training.snapshots.gate()
        with_parts(training)
        for step in (50, 51):
            held = boundary_with_parts(training, step)
            training.snapshots.gate()
            table = capture(training.objects)
            assert in_slots(training.folder)[step] == table.skeleton + bytes_in(table, held)
        assert len(held) > 1 and not table.is_whole
    with small_chunks(8):
        held_here = Digests().begin(capture(training.objects)).finish()
    assert training.snapshots._digest_of(Ordinal(0, 51)) == held_here, "of what this rank has"
    assert (training.snapshots.tally.torn, training.said) == (0, [])


def test_memory_that_was_released_is_free_after_the_next_snapshot(kept: Training) -> None:
    with small_chunks(8):
        kept.ready()
        for _ in range(6):  # all slots have been written
            wait_for(functools.partial(is_ready, kept.snapshots, kept.steps + 1))
            kept.step()
        kept.snapshots.gate()
        former = kept.model[2].weight.untyped_storage()
        with_parts(kept)
        boundary_with_parts(kept, 50)
        kept.snapshots.gate()
        assert torch._C._storage_Use_Count(former._cdata) == 1, "only this test looks at it"


def test_a_part_that_is_written_while_it_is_copied_is_noticed(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_chunks(8):
        training.ready()
        training.snapshots.gate()
        part = with_parts(training)
        begun, go_on, copy = threading.Event(), threading.Event(), torch._foreach_copy_

        def slow(*args: Any) -> None:
            if threading.current_thread().name == "copying":
                begun.set()
                go_on.wait(10)
            copy(*args)

        monkeypatch.setattr(torch, "_foreach_copy_", slow)
        boundary_with_parts(training, 50)
        assert begun.wait(10)
        part.add_(1.0)
        go_on.set()
        wait_for(lambda: training.snapshots.tally.torn == 1)


def test_without_a_free_slot_nothing_is_captured_and_that_is_counted(training: Training) -> None:
    training.ready()
    before = training.snapshots.tally.skipped
    for _ in range(6):
        training.step()
    training.snapshots.gate()
    assert training.snapshots.tally.captured == 3 and training.snapshots.tally.skipped == before + 3


def test_protected_snapshots_make_room(kept: Training) -> None:
    kept.ready()
    for _ in range(20):
        kept.step()
        kept.snapshots.gate()
        newest = Ordinal(0, kept.snapshots.tally.newest).packed()
        wait_for(functools.partial(is_protected, kept.snapshots, kept.steps + 1, newest))
    assert kept.snapshots.tally.captured >= 10
    assert kept.snapshots.tally.protected >= kept.steps - 4


def test_the_first_snapshot_of_a_new_membership_is_due_at_once(tmp_path: Path) -> None:
    training, later = Training(tmp_path / "run", every=1000), Seating(generation=7, rank=0, world=1)
    training.ready()

    def is_due(*, renewed: bool) -> bool:
        return training.snapshots.wish(Ordinal(0, training.steps + 1), 7, renewed=renewed).due

    assert not is_due(renewed=False) and is_due(renewed=True)
    training.snapshots.boundary(Ordinal(0, training.steps), training.objects, later, wanted=True)
    assert not is_due(renewed=True)


@pytest.mark.parametrize("ranks_before", [1, 2])
def test_snapshots_go_on_in_a_new_membership_though_the_former_ones_wait_for_protection(
    training: Training, ranks_before: int
) -> None:
    """Keepers protect what the new one captures, and that is nothing before a slot is free. With two ranks before, the
    slots are too small for what the only one captures now."""
    before, later = Seating(generation=1, rank=0, world=ranks_before), Seating(generation=7, rank=0, world=1)
    training.values["large"] = [torch.zeros(1 << 16) for _ in range(4)]
    training.step(seating=before)
    wait_for(lambda: is_ready(training.snapshots, training.steps + 1) and made_or_full(training.snapshots))
    for _ in range(6):
        training.step(seating=before)
    training.snapshots.gate()
    held = sorted(in_slots(training.folder))
    assert len(held) == 3, "all that there are"
    training.snapshots.boundary(Ordinal(0, training.steps), training.objects, later, wanted=False)
    assert not is_ready(training.snapshots, training.steps + 1), "in the former membership"
    wait_for(lambda: training.snapshots.wish(Ordinal(0, training.steps + 1), later.generation).room)
    assert not set(in_slots(training.folder)) - set(held[:2]), "no keeper can protect any more what was given up"
    training.steps += 1
    training.snapshots.boundary(Ordinal(0, training.steps), training.objects, later, wanted=True)
    training.snapshots.gate()
    assert sorted(in_slots(training.folder)) == [*held[:2], training.steps], "only the newest was given up"


def test_what_the_keeper_has_protected_is_kept_until_newer_ones_are_protected_everywhere(training: Training) -> None:
    """All nodes may have, though no exchange has told so before somebody died: then all would go back to it."""
    before, later = Seating(generation=1, rank=0, world=1), Seating(generation=7, rank=0, world=1)
    training.step(seating=before)
    wait_for(lambda: is_ready(training.snapshots, training.steps + 1) and made_or_full(training.snapshots))
    for _ in range(6):
        training.step(seating=before)
    training.snapshots.gate()
    held = sorted(in_slots(training.folder))
    standing = StandingFile(training.folder)
    standing.show("protected", SnapshotKey(attempt=1, branch=0, step=held[-1], generation=1))
    assert not is_ready(training.snapshots, training.steps + 1)
    standing.clear()  # a keeper takes another one's place
    standing.show("taken_up", SnapshotKey(attempt=1, branch=0, step=training.steps + 9, generation=7))
    wait_for(lambda: training.snapshots.wish(Ordinal(0, training.steps + 1), later.generation).room)
    training.steps += 1
    training.snapshots.boundary(Ordinal(0, training.steps), training.objects, later, wanted=True)
    training.snapshots.gate()
    assert held[-1] in in_slots(training.folder) and training.steps in in_slots(training.folder)
    standing.close()


def protected_by_its_keeper(training: Training) -> list[int]:
    """All slots are taken, the newest is protected here, and then the members change."""
    before = Seating(generation=1, rank=0, world=1)
    training.step(seating=before)
    wait_for(lambda: is_ready(training.snapshots, training.steps + 1) and made_or_full(training.snapshots))
    for _ in range(6):
        training.step(seating=before)
    training.snapshots.gate()
    held = sorted(in_slots(training.folder))
    with contextlib.closing(StandingFile(training.folder)) as standing:
        standing.show("protected", SnapshotKey(attempt=1, branch=0, step=held[-1], generation=1))
        for _ in range(2):
            assert not training.snapshots.wish(Ordinal(0, training.steps + 1), 7).room
    return held


def test_none_is_given_up_that_may_be_the_newest_protected_everywhere(training: Training) -> None:
    """What the other nodes' keepers have protected is not known: there is one slot more."""
    held = protected_by_its_keeper(training)
    wait_for(lambda: training.snapshots.wish(Ordinal(0, training.steps + 1), 7).room)
    training.steps += 1
    later = Seating(generation=7, rank=0, world=1)
    training.snapshots.boundary(Ordinal(0, training.steps), training.objects, later, wanted=True)
    training.snapshots.gate()
    assert sorted(in_slots(training.folder)) == [*held, training.steps]


def test_without_memory_for_one_slot_more_the_oldest_is_given_up(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, capacity_bytes: int) -> None:
        raise NoRoom(f"{path.parent}: {capacity_bytes} bytes are needed")

    training.ready()
    monkeypatch.setattr("resilient.slots.Slot.create", full)
    held = protected_by_its_keeper(training)
    wait_for(lambda: training.snapshots.wish(Ordinal(0, training.steps + 1), 7).room)
    assert sorted(in_slots(training.folder)) == held[1:]
    (said,) = training.said
    assert said.startswith("no memory for snapshots could be had") and "bytes are needed" in said


def test_one_slow_keeper_makes_all_skip_the_same_snapshots(tmp_path: Path) -> None:
    """Two ranks on two nodes, in lock step; what the second captures is never protected."""
    torch.manual_seed(0)
    quick, slow = Training(tmp_path / "quick"), Training(tmp_path / "slow")
    vault = Vault(run="r", attempt=1, node="a", folder=quick.folder, secret="s", ip="127.0.0.1")
    vault.ring(Ring(generation=1, group=Group(nodes=("a",), parity=0), shares={"a": (0,)}))
    captured = []
    for _ in range(12):
        wishes = []
        for training in (quick, slow):
            wish = training.snapshots.wish(Ordinal(0, training.steps + 1), 1)
            wait_for(functools.partial(made_or_full, training.snapshots))
            wishes.append(wish.lane())
        agreed = Agreed.of(list(map(min, *wishes)))
        for training in (quick, slow):
            training.snapshots.agreed(Ordinal(0, training.steps + 1), agreed)
            training.compute()
            training.snapshots.gate()
            training.update()
            training.snapshots.boundary(Ordinal(0, training.steps), training.objects, ALONE, wanted=agreed.capture)
        captured.append(agreed.capture)
    vault.close()
    for training in (quick, slow):
        training.snapshots.gate()
    assert captured.count(True) == 3, "as many as the slow one has slots"
    assert sorted(in_slots(slow.folder)) == [step + 1 for step, wanted in enumerate(captured) if wanted]
    assert quick.snapshots.tally.captured == slow.snapshots.tally.captured == 3


def test_writing_into_the_state_while_it_is_copied_gives_the_snapshot_up(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.ready()
    begun, go_on = threading.Event(), threading.Event()
    copy = torch._foreach_copy_

    def slow(*args: Any) -> None:
        begun.set()
        go_on.wait(10)
        copy(*args)

    monkeypatch.setattr(torch, "_foreach_copy_", slow)
    monkeypatch.setattr(training.snapshots, "gate", lambda: None)
    training.step()
    assert begun.wait(10)
    with torch.no_grad():
        training.model[0].weight.add_(1.0)
    go_on.set()
    wait_for(lambda: training.snapshots.tally.torn == 1)
    assert in_slots(training.folder) == {}
    assert "written while it was copied" in training.said[-1]


def test_a_state_that_outgrows_its_slots_gets_larger_ones(training: Training) -> None:
    training.ready()
    training.values["large"] = torch.zeros(1 << 20)
    training.step()
    training.step()
    wait_for(lambda: training.snapshots.wish(Ordinal(0, training.steps + 1), 1).room)
    state = training.step()
    assert state is not None
    training.snapshots.gate()
    assert in_slots(training.folder)[training.steps] == payload_of(state)


def test_too_little_room_at_the_start_is_an_error_that_says_how_much_is_needed(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, capacity_bytes: int) -> None:
        raise NoRoom(f"{path.parent}: {capacity_bytes} bytes are needed")

    monkeypatch.setattr("resilient.slots.Slot.create", full)
    training.step()
    wait_for(lambda: training.said != [])
    with pytest.raises(NoRoom, match="bytes are needed"):
        training.step()


@pytest.mark.long
def test_memory_does_not_grow_over_a_thousand_snapshots(kept: Training) -> None:
    kept.ready()
    process = psutil.Process()

    def used() -> tuple[int, int, int]:
        shared = sum(path.stat().st_blocks * 512 for path in kept.folder.iterdir())
        return process.memory_info().rss, shared, len(os.listdir("/proc/self/fd"))

    def capture_until(count: int) -> None:
        while kept.snapshots.tally.captured < count:
            wait_for(lambda: kept.snapshots.wish(Ordinal(0, kept.steps + 1), 1).room)
            kept.step()

    capture_until(200)
    before = used()
    capture_until(1200)
    after = used()
    assert after[0] < before[0] + (24 << 20)
    assert after[1] <= before[1] and after[2] <= before[2] + 2


class Ended(BaseException):
    pass


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("_on_host", ValueError("an odd device")),
        ("_on_host", Ended("an odd end")),
        ("slot", ValueError("an odd slot")),
        ("digest", ValueError("an odd digest")),
    ],
)
def test_whatever_ends_a_copy_opens_the_gate_and_the_next_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    training = Training(tmp_path)
    training.ready()
    training.snapshots.gate()

    def fails(*args: Any) -> None:
        raise error

    owner, name = {"_on_host": (Copy, "_on_host"), "slot": (Slot, "commit"), "digest": (Copy, "finish_digest")}[where]
    captured, torn = training.snapshots.tally.captured, training.snapshots.tally.torn
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        training.step()
        training.snapshots.gate()
        wait_for(lambda: len(training.said) == 1)
    assert str(error) in training.said[0]
    lost = int(where != "digest")
    assert training.snapshots.tally.torn == torn + lost
    wait_for(lambda: training.snapshots.wish(Ordinal(0, training.steps + 1), 1).room)
    training.step()
    training.snapshots.gate()
    wait_for(lambda: training.snapshots.tally.captured == captured + 2 - lost)


def test_the_copying_stream_is_the_devices_where_the_first_source_is_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Adam's `step` is on the host, also if all else is not."""
    streams: list[torch.device] = []

    def stream(device: torch.device) -> None:
        streams.append(device)
        raise RuntimeError("there is no such device")

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    slot = Slot.create(tmp_path / "slot", 4096)
    sources = [torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8, device="meta")]
    copy = Copy(
        ordinal=Ordinal(0, 1),
        slot=slot,
        targets=[torch.zeros(4, dtype=torch.uint8) for _ in sources],
        sources=sources,
        watched=[],
        ready=object(),
        digesting=None,
    )
    assert "no such device" in copy.finish() and streams == [torch.device("meta")]


def test_slots_that_could_not_be_prepared_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path)
    whole = Slot.create

    def fails(*args: Any) -> None:
        raise ValueError("the driver is odd")

    training.step()
    wait_for(lambda: made_or_full(training.snapshots) and training.snapshots._slots.made >= 3)
    monkeypatch.setattr(Slot, "create", fails)
    training.snapshots._slots.needed_bytes *= 4
    training.snapshots._slots.make_room()
    wait_for(lambda: made_or_full(training.snapshots))
    assert any("the driver is odd" in each for each in training.said)
    monkeypatch.setattr(Slot, "create", whole)
    training.snapshots._slots.make_room()
    wait_for(training.snapshots._slots.has_room)


def test_the_last_step_waits_for_the_slot_of_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ended without a checkpoint of its final state, where storage was slow with the one before."""
    training = Training(tmp_path, saves=Saves(every_steps=2))
    training.ready()
    while training.snapshots._slots.lifecycle.kept is None:
        training.step()
        training.snapshots.gate()
    kept, last = training.snapshots._slots.lifecycle.kept, training.steps + 1
    monkeypatch.setattr("resilient.snapshots.FINAL_WAIT_S", 0.2)
    assert not training.snapshots.wish(Ordinal(0, last), 1, last).save_room, "it is not waited for without end"
    monkeypatch.setattr("resilient.snapshots.FINAL_WAIT_S", 30.0)
    with contextlib.closing(StandingFile(tmp_path)):
        timer = threading.Timer(0.3, show_settled, (tmp_path, kept))
        timer.start()
        wish = training.snapshots.wish(Ordinal(0, last), 1, last)
        timer.join()
    assert wish.save_due and wish.save_room
