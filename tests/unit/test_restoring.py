"""A state read back, whole or in part, from the memory of keepers and from storage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import xxhash

from actors.reading import fetch_front
from actors.ring import Ring
from actors.transfer import TransferCorrupt, TransferRefused
from resilient.core.plan import Address, Restore, Share
from resilient.restoring import fetch, fetch_stored
from snapshot.absent import is_absent, release
from snapshot.arena import Slot, required_bytes
from snapshot.capture import capture
from snapshot.core.ranges import Ranges, common, merged
from snapshot.core.stripes import Group
from snapshot.files import open_files
from snapshot.load import load
from snapshot.skeleton import Skeleton
from tests.checkpoints import Parts, build, files_in, snapshot_of
from tests.shards import State, scattered
from tests.stages import bytes_in, others, small_chunks, spread, trained
from tests.vaults import RUN, SECRET, Nodes, flip, key_of, slots_in, wait_for

RANKS = {"a": (0, 2), "b": (1,)}


@pytest.fixture
def state() -> Iterator[State]:
    """Of three ranks, each chunk captured by any of them."""
    with small_chunks(64):
        yield scattered(snapshot_of(trained(), 5, world=3, run=RUN))


@pytest.fixture
def nodes(tmp_path: Path, state: State) -> Iterator[Nodes]:
    ring = Ring(generation=1, group=Group(nodes=("a", "b"), parity=1), shares=RANKS)
    nodes = Nodes(tmp_path, ring)
    nodes.start("ab")
    for node, ranks in RANKS.items():
        for rank in ranks:
            write_slot(nodes.folder(node), state, rank)
    for vault in nodes.vaults.values():
        vault.wake()
    wait_for(lambda: all(vault.inventory().images for vault in nodes.vaults.values()))
    yield nodes
    nodes.stop("ab")


def write_slot(folder: Path, state: State, rank: int) -> None:
    head = state.head(rank)
    with contextlib.closing(Slot.create(folder / f"rank-{head.member}.slot-1", required_bytes(head))) as slot:
        slot.begin(head)[:] = state.payload(rank)
        slot.commit()


def restore_from(nodes: Nodes) -> Restore:
    shares = []
    for node, ranks in RANKS.items():
        host, port = nodes.vaults[node].address
        shares += [Share(rank=rank, node=node, keeper=Address(host=host, port=port)) for rank in ranks]
    return Restore(key=key_of(5), shares=tuple(shares))


def parts_of(data: bytes, ranges: Ranges) -> bytes:
    return b"".join(data[start:stop] for start, stop in ranges)


def every_third(state: State) -> Ranges:
    return merged(list(pairwise((0, *state.ends)))[::3])


def test_all_of_it_comes_from_keepers(nodes: Nodes, state: State) -> None:
    table = fetch(restore_from(nodes), SECRET)
    assert table.is_whole and table.skeleton == state.skeleton.to_bytes()
    assert bytes_in(table, ((0, table.nbytes),)) == state.data


def test_what_is_wanted_comes_from_keepers(nodes: Nodes, state: State) -> None:
    seen: list[Skeleton] = []

    def wanted(layout: Skeleton) -> Ranges:
        seen.append(layout)
        return every_third(state)

    for ask in (wanted, every_third(state), (), ((0, len(state.data)),)):
        table = fetch(restore_from(nodes), SECRET, ask)
        expected = every_third(state) if callable(ask) else ask
        held = table.held_ranges()
        assert held == expected and bytes_in(table, held) == parts_of(state.data, held)
    assert seen == [state.skeleton]


def test_only_shares_that_have_some_of_it_are_read(nodes: Nodes, state: State) -> None:
    assert state.spread is not None
    for slot in (slots_in(nodes.folder("a"))[key_of(5), 2], slots_in(nodes.folder("b"))[key_of(5), 1]):
        flip(slot, slot.stat().st_size // 2)
    table = fetch(restore_from(nodes), SECRET, state.spread[0])
    assert bytes_in(table, state.spread[0]) == parts_of(state.data, state.spread[0])


def test_the_front_of_a_slot(nodes: Nodes, state: State) -> None:
    address = nodes.vaults["a"].address
    for rank in RANKS["a"]:
        head, skeleton = fetch_front(address, SECRET, key=key_of(5), node="a", rank=rank, skeleton=True)
        assert (head, skeleton) == (state.head(rank), state.skeleton.to_bytes())
        assert fetch_front(address, SECRET, key=key_of(5), node="a", rank=rank) == (head, b"")
    with pytest.raises(TransferRefused, match="rank 1"):
        fetch_front(address, SECRET, key=key_of(5), node="a", rank=1)


@pytest.mark.parametrize("what", ["head", "skeleton"])
def test_a_damaged_front_is_noticed(nodes: Nodes, state: State, what: str) -> None:
    path = slots_in(nodes.folder("b"))[key_of(5), 1]
    data = path.read_bytes()
    mark = b'"run":"' if what == "head" else state.skeleton.to_bytes()[:40]
    flip(path, data.index(mark) + 8)
    with pytest.raises((TransferCorrupt, TransferRefused)):
        fetch_front(nodes.vaults["b"].address, SECRET, key=key_of(5), node="b", rank=1, skeleton=True)


@pytest.mark.parametrize("compression", [None, 1])
def test_what_is_wanted_comes_from_storage(tmp_path: Path, state: State, compression: int | None) -> None:
    state.save(open_files(str(tmp_path)), compression)
    for wanted in (None, (), every_third(state), others(every_third(state), len(state.data))):
        table = fetch_stored(str(tmp_path), state.folder, wanted)
        held = table.held_ranges()
        assert held == (((0, len(state.data)),) if wanted is None else wanted)
        assert bytes_in(table, held) == parts_of(state.data, held)
    table = fetch_stored(str(tmp_path), state.folder, lambda layout: ((0, layout.offsets[1]),))
    assert bytes_in(table, table.held_ranges()) == state.data[: state.skeleton.offsets[1]]


def test_stages_that_never_had_the_whole_are_together_a_checkpoint(tmp_path: Path) -> None:
    """Each captures its own layers; anybody loads what he needs, or all of it."""
    whole = capture(trained())
    expected, files = whole.digest(), files_in(tmp_path)
    stages = [stage(number) for number in range(3)]
    tables = [capture(parts) for parts in stages]
    spread_out = [table.held_ranges() for table in tables]
    taken: Ranges = ()
    for number, held in enumerate(spread_out):  # what several hold is captured by the first
        spread_out[number] = common(held, others(taken, whole.nbytes))
        taken = merged((*taken, *held))
    assert taken == ((0, whole.nbytes),)
    data = bytearray(whole.nbytes)
    for table, ranges in zip(tables, spread_out, strict=True):
        for start, stop in ranges:
            data[start:stop] = bytes_in(table, ((start, stop),))
    assert {xxhash.xxh3_64_hexdigest(table.skeleton) for table in tables} == {xxhash.xxh3_64_hexdigest(whole.skeleton)}
    state = State(skeleton=whole.layout, data=bytes(data), step=5, world=3, spread=tuple(spread_out))
    state.save(files)
    fresh = build(9)
    load(fresh, fetch_stored(str(tmp_path), state.folder))
    assert capture(fresh).digest() == expected
    for number in range(3):
        parts = stage(number, seed=4)
        needed = capture(parts).held_ranges()
        load(parts, fetch_stored(str(tmp_path), state.folder, needed))
        assert bytes_in(capture(parts), needed) == bytes_in(whole, needed)


def stage(number: int, seed: int = 0) -> Parts:
    """The first block, the second, or what is around them; with everything that can't be spread."""
    parts = trained(seed)
    for name, tensor in spread(parts):
        block = int(name.split(".")[1]) if name.startswith("blocks") else 2
        if block != number:
            release(tensor)
    assert any(is_absent(tensor) for _, tensor in spread(parts)) and torch.is_tensor(parts["run.state"]["ema"])
    return parts
