"""Node images over slots: the same bytes as of slots laid one after the other, and where they are damaged."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from snapshot.arena import Slot, SlotView, required_bytes
from snapshot.core.stripes import Group
from snapshot.image import ImageView, SlotFolder, read_image
from snapshot.slot import PAGE_BYTES, NotASlot, SlotChanged, SlotError, padded
from tests.vaults import RUN, flip, head_of, key_of, payload_of, ring_of, slots_in, write_slots

RING = ring_of("ab", 1, ranks_each=3)
KEY = key_of(4)


def sealed(folder: Path) -> list[SlotView]:
    """Those of node a, the last rank first."""
    write_slots(folder, RING, KEY, RING.ranks_on("a"), share_bytes=600_001)
    views = [SlotView.open(path) for path in sorted(folder.glob("rank-*"), reverse=True)]
    for view in views:
        view.seal()
    return views


def joined(image: ImageView, start: int, stop: int) -> bytes:
    return b"".join(bytes(part) for part in image.parts(start, stop))


def test_bytes_of_any_range(tmp_path: Path) -> None:
    views = sealed(tmp_path)
    image = ImageView("a", views)
    twin = b"".join(bytes(view.image).ljust(padded(len(view.image)), b"\0") for view in reversed(views))
    assert image.image_bytes == len(twin) and image.key == KEY
    assert joined(image, 0, len(twin)) == twin
    edges = sorted({0, 1, len(twin)} | {at + by for at in _ends(views) for by in (-5000, -1, 0, 1)})
    for start in edges:
        for stop in edges:
            assert joined(image, start, stop) == twin[start:stop]
    assert bytes(image.slot(1).payload) == payload_of(head_of(RING, KEY, 1, 600_001))
    with pytest.raises(KeyError, match="rank 3"):
        image.slot(3)
    again = read_image("a", memoryview(bytearray(twin)), "copy")
    assert again.described == image.described and again.key == KEY
    assert [shard.rank for shard in again.described.shards] == [0, 1, 2]


def test_only_sealed_slots_of_one_snapshot(tmp_path: Path) -> None:
    views = sealed(tmp_path)
    with pytest.raises(ValueError, match="differ"):
        ImageView("a", [*views, views[0]])
    write_slots(tmp_path, RING, key_of(5), [0])
    late = SlotView.open(tmp_path / "rank-100.slot-2")
    with pytest.raises(SlotChanged, match="not sealed"):
        ImageView("a", [late])
    late.seal()
    with pytest.raises(ValueError, match="one snapshot"):
        ImageView("a", [late, views[0]])


def test_bad_pieces_are_those_with_damaged_chunks(tmp_path: Path) -> None:
    group = Group(nodes=tuple("abcdef"), parity=1)
    sealed(tmp_path)
    paths = sorted(tmp_path.glob("rank-*"))
    whole = ImageView("a", [SlotView.open(path) for path in paths])
    assert whole.bad_pieces(group) == ()
    assert whole.bad_pieces(Group(nodes=("a",), parity=0)) == ()
    # The last byte of the middle slot.
    flip(paths[1], len(SlotView.open(paths[1]).image) - 1)
    ends = _ends([SlotView.open(path) for path in reversed(paths)])
    at = (ends[1] - 4096) // group.piece_bytes(whole.image_bytes)
    assert at in whole.bad_pieces(group) and len(whole.bad_pieces(group)) <= 2
    assert whole.bad_pieces(Group(nodes=("a",), parity=0)) == (0,)
    # The sums of the first slot: nothing of it can be trusted.
    flip(paths[0], 2 * PAGE_BYTES)
    reached = -(-ends[0] // group.piece_bytes(whole.image_bytes))
    assert set(whole.bad_pieces(group)) >= set(range(reached))


def test_a_slot_that_is_begun_anew_is_noticed(tmp_path: Path) -> None:
    head = head_of(RING, KEY, 0, 5000)
    with contextlib.closing(Slot.create(tmp_path / "rank-100.slot-0", required_bytes(head))) as slot:
        slot.begin(head)[:] = payload_of(head)
        slot.commit()
        view = SlotView.open(slot.path)
        view.seal()
        image = ImageView("a", [view])
        image.check_unchanged()
        slot.begin(head_of(RING, key_of(7), 0, 5000))
        with pytest.raises(SlotChanged, match="written anew"):
            image.check_unchanged()
        with pytest.raises(SlotChanged):
            image.bad_pieces(Group(nodes=("a",), parity=0))


def test_an_image_in_one_piece_that_is_none(tmp_path: Path) -> None:
    view = sealed(tmp_path)[0]
    good = bytes(view.image).ljust(padded(len(view.image)), b"\0")
    for wrong in (b"", good[:-PAGE_BYTES], good + bytes(100), bytes(PAGE_BYTES), good + good[:PAGE_BYTES]):
        with pytest.raises(SlotError):
            read_image("a", memoryview(wrong), "wrong")


def test_a_folder_of_slots_is_looked_at_again_and_again(tmp_path: Path) -> None:
    folder = SlotFolder(tmp_path, RUN)
    assert folder.look() == {}
    write_slots(tmp_path, RING, KEY, [0, 1])
    assert {key: sorted(slots) for key, slots in folder.look().items()} == {KEY: [0, 1]}
    first = folder.look()[KEY][0]
    assert folder.look()[KEY][0] is first
    first.seal()
    assert folder.look()[KEY][0] is first and folder.look()[KEY][0].sealed
    assert folder.held_bytes() == sum(len(view.payload) for view in folder.look()[KEY].values())
    write_slots(tmp_path, RING, key_of(7), [0])  # the same file name
    assert {key.step: sorted(slots) for key, slots in folder.look().items()} == {7: [0], 4: [1]}
    slots_in(tmp_path)[KEY, 1].unlink()
    assert {key.step for key in folder.look()} == {7}


def test_files_that_are_no_slots_of_the_run_are_told(tmp_path: Path) -> None:
    write_slots(tmp_path, RING, KEY, [0, 1])
    (tmp_path / "rank-9.slot-0").write_bytes(b"short")
    flip(tmp_path / "rank-100.slot-1", PAGE_BYTES + 10)
    folder = SlotFolder(tmp_path, RUN)
    assert sorted(folder.look()[KEY]) == [1]
    assert {path.name for path in folder.skipped} == {"rank-9.slot-0", "rank-100.slot-1"}
    other = SlotFolder(tmp_path, "bert")
    assert other.look() == {} and len(other.skipped) == 3
    with pytest.raises(NotASlot):
        SlotView.open(tmp_path / "rank-9.slot-0")


def _ends(views: list[SlotView]) -> list[int]:
    """Of the slots in the image, in order of rank; the views are in the opposite order."""
    ends = [0]
    for view in reversed(views):
        ends.append(ends[-1] + padded(len(view.image)))
    return ends[1:]
