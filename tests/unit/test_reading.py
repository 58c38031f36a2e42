"""What a keeper gives others to read is not whole if a rank writes it anew meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.reading import Serving
from snapshot.arena import Slot, SlotView, required_bytes
from snapshot.core.inventory import SnapshotKey
from snapshot.fields import key_fields
from snapshot.image import ImageView
from tests.vaults import head_of, key_of, payload_of, ring_of

RING, KEY = ring_of("ab", 1), key_of(4)
REQUEST = {"key": key_fields(KEY), "node": "a", "rank": 0, "start": 0, "stop": 5000}


class Stream:
    """Something happens when the bytes are on their way."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.meanwhile = meanwhile
        self.sent = b""

    def send(self, parts: Iterable[memoryview]) -> None:
        self.sent = b"".join(bytes(part) for part in parts)
        self.meanwhile()


def begin(slot: Slot, key: SnapshotKey = KEY) -> None:
    head = head_of(RING, key, 0, 5000)
    slot.begin(head)[:] = payload_of(head)


def write(slot: Slot, key: SnapshotKey = KEY) -> None:
    begin(slot, key)
    slot.commit()


def write_and_seal(slot: Slot, key: SnapshotKey) -> None:
    write(slot, key)
    with contextlib.closing(SlotView.open(slot.path)) as view:
        view.seal()


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[Slot]:
    path = tmp_path / "rank-100.slot-0"
    with contextlib.closing(Slot.create(path, required_bytes(head_of(RING, KEY, 0, 5000)))) as slot:
        write(slot)
        yield slot


@pytest.fixture
def serving(slot: Slot) -> Iterator[Serving]:
    with contextlib.closing(SlotView.open(slot.path)) as view:
        view.seal()
        image = ImageView("a", [view])
        holdings: Any = SimpleNamespace(slot=lambda *_: view, image=lambda *_: image)
        yield Serving(holdings, lambda *_: memoryview(b""))


def serve(serving: Serving, op: str, meanwhile: Callable[[], object]) -> bytes:
    stream: Any = Stream(meanwhile)
    serving.serve(op, REQUEST, stream)
    sent: bytes = stream.sent
    return sent


@pytest.mark.parametrize("op", ["slot", "block"])
def test_what_stays_as_it_was_is_whole(slot: Slot, serving: Serving, op: str) -> None:
    assert serve(serving, op, lambda: None) == bytes(slot.memory[:5000])


@pytest.mark.parametrize("op", ["slot", "block"])
@pytest.mark.parametrize(
    "meanwhile",
    [
        Slot.invalidate,
        begin,
        write,
        lambda slot: write(slot, key_of(7)),
        lambda slot: write_and_seal(slot, key_of(7)),
    ],
    ids=["given up", "begun", "the same committed again", "another committed", "another sealed"],
)
def test_what_is_written_anew_while_it_is_read_is_refused(
    slot: Slot, serving: Serving, op: str, meanwhile: Callable[[Slot], object]
) -> None:
    with pytest.raises(ValueError, match=r"anew|not committed"):
        serve(serving, op, lambda: meanwhile(slot))
