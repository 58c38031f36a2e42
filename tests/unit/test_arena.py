"""Slots in shared memory: what is committed is whole, whatever happened to who wrote or sealed it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from snapshot import room
from snapshot import slot as layout
from snapshot.arena import (
    NoRoom,
    NotASlot,
    RottenSlot,
    Slot,
    SlotChanged,
    SlotError,
    SlotHead,
    SlotView,
    check_room,
    find_slots,
    free_bytes,
    required_bytes,
)
from snapshot.slot import PAGE_BYTES, image_bytes

ROOT = Path(__file__).parents[2]


def head_of(step: int = 7, share_bytes: int = 5000, chunk_bytes: int = 2048, skeleton_bytes: int = 33) -> SlotHead:
    ends = (*range(skeleton_bytes, skeleton_bytes + share_bytes, chunk_bytes), skeleton_bytes + share_bytes)
    return SlotHead(
        run="gpt",
        attempt=1,
        branch=0,
        generation=3,
        step=step,
        member=4,
        rank=1,
        world=2,
        ranges=((100, 100 + share_bytes),) if share_bytes else (),
        state_bytes=100 + share_bytes,
        chunks=ends if share_bytes else (skeleton_bytes,),
        skeleton="0123456789abcdef" * 2,
        skeleton_bytes=skeleton_bytes,
    )


def payload_of(head: SlotHead) -> bytes:
    """Different for each step."""
    return random.Random(head.step).randbytes(head.payload_bytes)


def fill(slot: Slot, head: SlotHead) -> None:
    slot.begin(head)[:] = payload_of(head)
    slot.commit()


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[Slot]:
    with contextlib.closing(Slot.create(tmp_path / "rank-4.slot-0", 1 << 16)) as slot:
        yield slot


@pytest.fixture
def view(slot: Slot) -> Iterator[SlotView]:
    with contextlib.closing(SlotView.open(slot.path)) as view:
        yield view


# The head


def test_a_head_there_and_back() -> None:
    head = head_of()
    data = head.to_bytes()
    assert SlotHead.from_bytes(data) == head
    assert data.isascii()
    assert head.payload_bytes == 33 + 5000
    assert head.key == (1, 0, 7, 3)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("run", "", "run: '' is not a name"),
        ("run", 5, "run: 5"),
        ("step", -1, "step: -1"),
        ("step", True, "step: True"),
        ("step", 1.0, "step: 1.0"),
        ("step", 1 << 63, "step: 9223372036854775808"),
        ("rank", 2, "rank: 2 is not within 0..1"),
        ("ranges", ((5101, 5100),), "ranges: 5101..5100 is empty"),
        ("ranges", ((100, 200), (200, 5100)), "ranges: 200..5100 is empty, or not within 201"),
        ("ranges", ((0, 1000), (1100, 5100)), "chunks: one spans two ranges"),
        ("ranges", ((100, 5099),), "they end at 5033, not with the share"),
        ("ranges", ((100,),), "no pairs"),
        ("ranges", ((100, True),), "no integers"),
        ("state_bytes", 5099, "ranges: 100..5100 is empty, or not within 0..5099"),
        ("chunks", (), "the first must be the skeleton"),
        ("chunks", (33, "5033"), "not a tuple of integers"),
        ("chunks", (33, True, 5033), "not a tuple of integers"),
        ("chunks", (33, 33, 5033), "do not ascend"),
        ("chunks", (33, 4000, 3000, 5033), "do not ascend"),
        ("chunks", (33, 5032), "they end at 5032"),
        ("skeleton_bytes", 0, "the first must be the skeleton"),
        ("skeleton", "xyz", "digest"),
    ],
)
def test_impossible_heads(field: str, value: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(head_of(), **{field: value})
    if not isinstance(value, tuple):
        node = {**json.loads(head_of().to_bytes()), field: value}
        with pytest.raises(ValueError, match=told):
            SlotHead.from_bytes(json.dumps(node, sort_keys=True, separators=(",", ":")).encode())


def test_a_share_of_several_ranges() -> None:
    head = replace(head_of(), ranges=((0, 2048), (3000, 5952)), state_bytes=7000, chunks=(33, 1033, 2081, 5033))
    assert SlotHead.from_bytes(head.to_bytes()) == head
    assert (head.share_bytes, head.payload_bytes) == (5000, 5033)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[1]",
        b"{}",
        b"[" * 100_000,
        b" " + head_of().to_bytes(),
        head_of().to_bytes()[:-1],
        head_of().to_bytes().replace(b"{", b'{"more":1,', 1),
        head_of().to_bytes().replace(b'"step":7', b'"step":6,"step":7'),
        head_of().to_bytes().replace(b"7", b"7" * 5000, 1),
        b"0" * ((16 << 20) + 1),
    ],
    ids=range(12),
)
def test_what_is_no_head(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        SlotHead.from_bytes(data)
    assert len(str(caught.value)) < 500


# From empty to sealed


def test_the_states_of_a_slot(slot: Slot, view: SlotView) -> None:
    head = head_of()

    def states() -> tuple[str, bool, bool]:
        return view.state, view.committed, view.sealed

    assert states() == ("open", False, False)
    buffer = slot.begin(head)
    buffer[:] = payload_of(head)
    assert states() == ("open", False, False)
    slot.commit()
    assert states() == ("committed", True, False)
    assert view.head() == head
    assert view.payload == payload_of(head)
    with pytest.raises(SlotChanged, match="not sealed"):
        view.verify()
    view.seal()
    assert states() == ("sealed", True, True)
    assert view.verify() == ()
    image = bytes(view.image)
    view.seal()
    assert view.image == image
    slot.invalidate()
    assert states() == ("open", False, False)
    fill(slot, replace(head, step=8))
    assert states() == ("committed", True, False)


@pytest.mark.parametrize("act", [SlotView.head, SlotView.seal, SlotView.verify])
def test_nothing_can_be_asked_of_an_open_slot(slot: Slot, view: SlotView, act: object) -> None:
    assert callable(act)
    slot.begin(head_of())
    with pytest.raises(SlotChanged, match="not committed"):
        act(view)
    for name in ("image", "payload"):
        with pytest.raises(SlotChanged, match="not committed"):
            getattr(view, name)


@pytest.mark.parametrize("share_bytes", [0, 1, 4095, 4096, 4097, 30_000])
@pytest.mark.parametrize("chunk_bytes", [16, 1024, 1 << 20])
def test_a_round_trip(tmp_path: Path, share_bytes: int, chunk_bytes: int) -> None:
    head = head_of(share_bytes=share_bytes, chunk_bytes=chunk_bytes)
    slot = Slot.create(tmp_path / "rank-4.slot-1", required_bytes(head))
    fill(slot, head)
    view = SlotView.open(slot.path)
    view.seal()
    copy = SlotView(bytes(view.image), "the decoded image")
    for each in (view, copy):
        assert (each.state, each.head(), each.verify()) == ("sealed", head, ())
        assert each.payload == payload_of(head)
        assert each.image.readonly
        assert each.payload.readonly
    assert len(view.image) == image_bytes(head)
    view.close()
    slot.close()


def test_the_payload_begins_on_a_page_and_can_be_an_array(slot: Slot) -> None:
    head = head_of()
    buffer = slot.begin(head)
    array = numpy.frombuffer(buffer, numpy.uint8)
    array[:] = numpy.frombuffer(payload_of(head), numpy.uint8)
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE_BYTES == 0
    slot.commit()
    view = SlotView.open(slot.path)
    slot.close()  # the array still holds the memory
    assert array.tobytes() == payload_of(head) == view.payload
    view.close()


def test_later_counters_fit_the_required_bytes(tmp_path: Path) -> None:
    """Whatever the length of the run's name, which decides how much of the head's last page is left."""
    most = 2**63 - 1
    for length in range(1, 256):
        head = replace(head_of(), run="x" * length)
        later = replace(
            head, attempt=most, branch=most, generation=most, step=most, member=most, rank=most - 1, world=most
        )
        assert image_bytes(later) <= required_bytes(head)


def test_what_does_not_fit_changes_nothing(slot: Slot, view: SlotView) -> None:
    fill(slot, head_of())
    with pytest.raises(ValueError, match=f"the slot {1 << 16}"):
        slot.begin(head_of(share_bytes=1 << 16))
    assert view.head() == head_of()
    assert view.payload == payload_of(head_of())


def test_a_file_is_the_owners_alone_and_never_written_over(slot: Slot) -> None:
    assert stat.S_IMODE(slot.path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        Slot.create(slot.path, 4096)
    assert slot.path.stat().st_size == slot.capacity_bytes == 1 << 16
    with pytest.raises(ValueError, match="capacity_bytes: 0"):
        Slot.create(slot.path, 0)
    slot.unlink()
    slot.unlink()
    assert not slot.path.exists()


# Sealing while the rank begins anew


@pytest.mark.parametrize("act", ["invalidate", "begin", "commit another"])
@pytest.mark.parametrize("during", ["chunk_sums", "write_sums_sum"])
def test_a_slot_that_changed_is_not_sealed(
    slot: Slot, view: SlotView, monkeypatch: pytest.MonkeyPatch, act: str, during: str
) -> None:
    fill(slot, head_of(7))
    original = getattr(layout, during)

    def meanwhile(*args: object) -> object:
        done = original(*args)
        if act == "invalidate":
            slot.invalidate()
        elif act == "begin":
            slot.begin(head_of(8))
        else:
            fill(slot, head_of(8))
        return done

    monkeypatch.setattr(layout, during, meanwhile)
    with pytest.raises(SlotChanged, match="any more"):
        view.seal()
    assert not view.sealed


def test_a_slot_that_changed_while_it_was_verified_is_neither_good_nor_bad(
    slot: Slot, view: SlotView, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(slot, head_of(7))
    view.seal()
    original = layout.chunk_sums

    def meanwhile(payload: memoryview, head: SlotHead) -> tuple[int, ...]:
        sums = original(payload, head)
        fill(slot, head_of(8))
        return sums

    monkeypatch.setattr(layout, "chunk_sums", meanwhile)
    with pytest.raises(SlotChanged, match="any more"):
        view.verify()


def test_a_seal_that_comes_too_late_is_no_seal(slot: Slot, view: SlotView) -> None:
    """The one moment that can't be closed: between the last look at the commit word and the seal."""
    fill(slot, head_of(7))
    view.seal()
    late = view.image[72:80].tobytes()
    slot.begin(head_of(8))[:] = payload_of(head_of(8))
    view._buffer[72:80] = late
    assert view.state == "open"
    slot.commit()
    assert view.state == "committed"
    layout.write_seal(view._buffer, int.from_bytes(late, "little"))
    with pytest.raises(RottenSlot, match="seal"):
        view.verify()


def test_a_keeper_killed_while_sealing_is_taken_over(slot: Slot, view: SlotView) -> None:
    fill(slot, head_of())
    view._buffer[56:64] = b"anything"  # sums were being written
    assert view.state == "committed"
    with contextlib.closing(SlotView.open(slot.path)) as successor:
        successor.seal()
        assert successor.verify() == ()


# Damage


def test_every_damaged_byte_is_noticed() -> None:
    """Whatever bit of a sealed image flips: a chunk is named, or the image as a whole is refused."""
    head = head_of(share_bytes=300, chunk_bytes=100)
    image = bytearray(image_bytes(head))
    view = make_image(head, image)
    ends, payload_at = (0, *head.chunks), len(image) - head.payload_bytes
    assert view.verify() == ()
    for position in range(len(image)):
        image[position] ^= 1 << position % 8
        try:
            damaged = SlotView(image, "the image")
            bad = damaged.verify()
        except SlotError:
            assert position < payload_at
        else:
            assert position >= payload_at
            assert len(bad) == 1
            assert ends[bad[0]] <= position - payload_at < ends[bad[0] + 1]
        image[position] ^= 1 << position % 8
    assert view.verify() == ()


def make_image(head: SlotHead, image: bytearray) -> SlotView:
    slot = Slot.__new__(Slot)
    slot.path, slot._buffer, slot._word = Path("memory"), memoryview(image), None
    fill(slot, head)
    view = SlotView(image, "the image")
    view.seal()
    return view


def test_the_damage_is_named() -> None:
    head = head_of()
    image = bytearray(image_bytes(head))
    make_image(head, image)

    def told(position: int) -> str:
        damaged = bytearray(image)
        damaged[position] ^= 0x10
        with pytest.raises(SlotError) as caught:
            SlotView(damaged, "rank-4.slot-0").verify()
        return f"{type(caught.value).__name__} {caught.value}"

    assert told(0) == "NotASlot rank-4.slot-0 begins with b'BSLSLOT1', not with b'RSLSLOT1'"
    assert told(20) == "RottenSlot rank-4.slot-0: the preamble is damaged"
    assert told(64) == "RottenSlot rank-4.slot-0: the preamble is damaged"
    assert told(75).startswith("RottenSlot rank-4.slot-0: the seal is damaged")
    assert told(4095) == "RottenSlot rank-4.slot-0: the preamble is damaged"
    assert told(4100) == "RottenSlot rank-4.slot-0: the head is damaged"
    assert told(8192) == "RottenSlot rank-4.slot-0: the sums are damaged"
    several = bytearray(image)
    several[-1] ^= 1
    several[-5000] ^= 1
    assert SlotView(several, "several").verify() == (1, 3)


def test_a_shortened_image_is_refused() -> None:
    head = head_of()
    image = bytearray(image_bytes(head))
    make_image(head, image)
    for length in (0, 1, 79, 80, 4095, 4096, 4097, 8192, len(image) - 1):
        with pytest.raises(SlotError):
            SlotView(bytes(image[:length]), "short").verify()
    longer = SlotView(bytes(image) + b"behind", "longer")
    assert longer.verify() == ()
    assert longer.image == image


@pytest.mark.parametrize("seed", range(20))
def test_garbage_is_no_slot(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(random.Random(seed).randbytes(random.Random(seed).randrange(20_000)))
    with pytest.raises(NotASlot):
        SlotView.open(path)


def test_lengths_that_lie_are_not_believed(tmp_path: Path) -> None:
    """Right checksums, impossible lengths: nothing is allocated, nothing read past the end."""
    for lengths in ((2**63, 8, 8), (100, 2**64 - 8, 8), (100, 8, 2**64 - 1), (0, 0, 0), (17 << 20, 8, 8)):
        image = bytearray(32 << 20)
        image[:40] = layout._FIELDS.pack(b"RSLSLOT1", layout.FORMAT, *lengths)
        image[40:48] = layout._sum(bytes(image[:40])).to_bytes(8, "little")
        image[64:72] = layout._word(image, 1).to_bytes(8, "little")
        with pytest.raises(RottenSlot):
            SlotView(image, "liar").head()


@pytest.mark.parametrize("kind", ["empty file", "short", "sparse", "folder", "link", "pipe"])
def test_what_can_be_no_slot_is_not_mapped(tmp_path: Path, slot: Slot, kind: str) -> None:
    path = tmp_path / "x.slot-1"
    if kind == "empty file":
        path.touch()
    elif kind == "short":
        path.write_bytes(b"RSLSLOT1" * 500)
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 1 << 30)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(slot.path)
    else:
        os.mkfifo(path)
    with pytest.raises(NotASlot, match=r"x\.slot-1"):
        SlotView.open(path)
    assert [found.state for found in find_slots(tmp_path)] == ["open", "not a slot"]
    with pytest.raises(FileNotFoundError):
        SlotView.open(tmp_path / "nothing")


# Adoption


def test_a_new_keeper_finds_what_the_dead_left(tmp_path: Path) -> None:
    heads = {number: head_of(step=number) for number in range(4)}
    for number, head in heads.items():
        slot = Slot.create(tmp_path / f"rank-4.slot-{number}", required_bytes(head))
        if number == 0:
            slot.begin(head)
        else:
            fill(slot, head)
        slot.close()
    for number in (2, 3):
        view = SlotView.open(tmp_path / f"rank-4.slot-{number}")
        view.seal()
        view.close()
    with (tmp_path / "rank-4.slot-3").open("r+b") as file:
        file.seek(4100)
        file.write(b"rot")
    (tmp_path / "rank-4.words").write_bytes(b"not this")
    found = find_slots(tmp_path)
    assert [(each.path.name, each.state, each.head) for each in found] == [
        ("rank-4.slot-0", "open", None),
        ("rank-4.slot-1", "committed", heads[1]),
        ("rank-4.slot-2", "sealed", heads[2]),
        ("rank-4.slot-3", "rotten", None),
    ]
    assert "head" in found[3].why
    assert find_slots(tmp_path / "nowhere") == []


# Room


def test_too_little_room_says_what_to_change(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    check_room(tmp_path, 1 << 20, "three slots")
    for act in (
        lambda: check_room(tmp_path, free + (1 << 40), "three slots"),
        lambda: Slot.create(tmp_path / "rank-4.slot-0", free + (1 << 40)),
    ):
        with pytest.raises(
            NoRoom, match=r"no room for (three slots|rank-4\.slot-0): .* MiB needed, .* MiB free"
        ) as caught:
            act()
        for remedy in ("--shm-size", "emptyDir", "medium: Memory", "sizeLimit", str(tmp_path), "fewer parity"):
            assert remedy in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_pages_are_present_also_on_an_older_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_POPULATE_WRITE", 9999)
    slot = Slot.create(tmp_path / "rank-4.slot-0", (20 << 20) + 1)
    assert slot.capacity_bytes == (20 << 20) + 4096
    assert bytes(slot._buffer).count(0) == slot.capacity_bytes
    slot.close()


def test_nothing_leaks(tmp_path: Path) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count(str(tmp_path))

    before = held()
    for number in range(300):
        slot = Slot.create(tmp_path / "rank-4.slot-0", 1 << 16)
        fill(slot, head_of(step=number))
        view = SlotView.open(slot.path)
        view.seal()
        kept = view.payload[:10]
        view.close()
        slot.close()
        slot.unlink()
        del kept, view, slot
        (tmp_path / "bad").write_bytes(b"x" * 5000)
        with pytest.raises(NotASlot):
            SlotView.open(tmp_path / "bad")
    assert held() == before


# A writer killed anywhere

WRITER = """
import os, sys
from dataclasses import replace
from pathlib import Path
from snapshot.arena import Slot, SlotHead, SlotView, required_bytes

folder, head = Path(sys.argv[1]), SlotHead.from_bytes(sys.argv[2].encode())
slots = [Slot.create(folder / f"rank-4.slot-{number}", required_bytes(head)) for number in range(3)]
views = [SlotView.open(slot.path) for slot in slots]
for step in range(10**9):
    slot, view, content = slots[step % 3], views[step % 3], step.to_bytes(8, "little") * 8192
    buffer = slot.begin(replace(head, step=step))
    for start in range(0, len(buffer), len(content)):
        buffer[start : start + len(content)] = content[: len(buffer) - start]
    slot.commit()
    os.write(1, b"%d\\n" % step)
    view.seal()
"""


@pytest.mark.parametrize("rounds", [60, pytest.param(200, marks=pytest.mark.long)])
def test_what_a_killed_writer_committed_is_whole(tmp_path: Path, rounds: int) -> None:
    seen = {"open": 0, "committed": 0, "sealed": 0}
    moments = random.Random(0)
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        told = kill_a_writer(folder, lines=moments.randrange(12), wait_s=moments.random() * 2e-3)
        found = find_slots(folder)
        steps = {look.head.step for look in found if look.head is not None}
        # Perhaps it was killed before it could tell; all but the one that it was writing are there.
        assert steps & {told, told + 1} if told >= 0 else steps <= {0}
        assert steps >= {step for step in (told - 1, told) if step >= 0}
        for look in found:
            seen[look.state] += 1
            if look.head is not None:
                check_content(look.path, look.head)
            look.path.unlink()
    assert seen["open"] > 0, "no writer was caught in the act"
    assert seen["sealed"] > 0


def kill_a_writer(folder: Path, lines: int, wait_s: float) -> int:
    """The last step that it said was committed; -1 if none."""
    head = head_of(share_bytes=400_000, chunk_bytes=1 << 16)
    command = [sys.executable, "-c", WRITER, str(folder), head.to_bytes().decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout is not None
        told = [writer.stdout.readline() for _ in range(lines)]
        threading.Event().wait(wait_s)
        writer.kill()
        told += writer.stdout.readlines()
    assert writer.returncode == -signal.SIGKILL
    return max((int(line) for line in told if line.endswith(b"\n")), default=-1)


def check_content(path: Path, head: SlotHead) -> None:
    with contextlib.closing(SlotView.open(path)) as view:
        content = head.step.to_bytes(8, "little")
        assert view.payload == (content * (head.payload_bytes // 8 + 1))[: head.payload_bytes]
        view.seal()
        assert view.verify() == ()
