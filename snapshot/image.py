"""A node image: the sealed images of one node's slots, in order of rank, each padded with zeros to a page.

It is seen through the slots where they lie, or lies as a whole in a file of its own, when it was decoded. Parity is
computed over it as opaque bytes. Beside it stands the folder that a node's ranks write their slots into.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshot.arena import SlotView
from snapshot.core.inventory import NodeImage, ShardFound, SnapshotKey
from snapshot.core.stripes import Group
from snapshot.slot import PAGE_BYTES, NotASlot, RottenSlot, SlotChanged, SlotError, SlotHead, padded

_ZEROS = memoryview(bytes(PAGE_BYTES))


def key_of(head: SlotHead) -> SnapshotKey:
    return SnapshotKey(attempt=head.attempt, branch=head.branch, step=head.step, generation=head.generation)


class ImageView:
    """The node image over sealed slots. It is about the moment of its making; see `check_unchanged`."""

    def __init__(self, node: str, slots: Sequence[SlotView]) -> None:
        """slots: of one snapshot, in any order, one of each rank. Raises SlotError unless all are sealed."""
        for view in slots:
            if not view.sealed:
                raise SlotChanged(f"{view.name} is not sealed")
        self._slots = sorted(((view.head(), view, view.image) for view in slots), key=lambda slot: slot[0].rank)
        self._fronts = [bytes(image[:PAGE_BYTES]) for _, _, image in self._slots]
        self.described = NodeImage(
            node=node,
            image_bytes=sum(padded(len(image)) for _, _, image in self._slots),
            shards=tuple(_shard(head) for head, _, _ in self._slots),
        )
        heads = [head for head, _, _ in self._slots]
        if len({key_of(head) for head in heads}) != 1 or len({head.rank for head in heads}) != len(heads):
            raise ValueError(f"slots: {', '.join(view.name for view in slots)}: must be of one snapshot and differ")
        self.key = key_of(heads[0])

    @property
    def image_bytes(self) -> int:
        return self.described.image_bytes

    def slot(self, rank: int) -> SlotView:
        """Raises KeyError if the rank was elsewhere."""
        for head, view, _ in self._slots:
            if head.rank == rank:
                return view
        raise KeyError(f"rank {rank} has no slot in the image of node {self.described.node}")

    def parts(self, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes start..stop of the image, where they lie."""
        at = 0
        for _, _, image in self._slots:
            end = at + padded(len(image))
            if start < end and at < stop:
                yield image[max(0, start - at) : stop - at]
                padding = min(stop, end) - max(start, at + len(image))
                if padding > 0:
                    yield _ZEROS[:padding]
            at = end

    def check_unchanged(self) -> None:
        """Raises SlotChanged if a rank has begun its slot anew since this view was made."""
        for front, (_, view, image) in zip(self._fronts, self._slots, strict=True):
            if image[:PAGE_BYTES] != front:
                raise SlotChanged(f"{view.name} was written anew while its image was in use")

    def bad_pieces(self, group: Group) -> tuple[int, ...]:
        """Those of the pieces that the group cuts the image into that are not what was sealed; ascending.

        Raises SlotChanged if a rank has begun its slot anew.
        """
        length = group.piece_bytes(self.image_bytes)
        ranges = self._bad_ranges()
        return tuple(sorted({piece for start, stop in ranges for piece in range(start // length, -(-stop // length))}))

    def _bad_ranges(self) -> Iterator[tuple[int, int]]:
        at = 0
        for head, view, image in self._slots:
            payload_at = at + len(image) - head.payload_bytes
            starts = (0, *head.chunks)
            try:
                bad = view.verify()
            except (RottenSlot, NotASlot):  # preamble, head or sums: the payload can't be trusted either
                yield at, at + padded(len(image))
            else:
                yield from ((payload_at + starts[number], payload_at + head.chunks[number]) for number in bad)
            at += padded(len(image))


def read_image(node: str, buffer: memoryview, name: str) -> ImageView:
    """Over an image that lies as a whole in a buffer. Raises SlotError if it is none, or is damaged in front."""
    slots, at = [], 0
    while at < len(buffer):
        view = SlotView(buffer[at:], f"{name} at {at}")
        slots.append(view)
        at += padded(len(view.image))
    if at != len(buffer) or not slots:
        raise NotASlot(f"{name}: its slots end at byte {at} of {len(buffer)}")
    return ImageView(node, slots)


@dataclass(frozen=True, slots=True)
class _Known:
    inode: int
    front: bytes
    view: SlotView
    head: SlotHead | None


class SlotFolder:
    """The slots in a folder, looked at again and again; any thread may. Only what has changed is read."""

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self._run = run
        self._lock = threading.Lock()
        self._known: dict[Path, _Known] = {}
        self.skipped: dict[Path, str] = {}
        """Files that can't be used, and why, as of the last look."""

    def look(self) -> dict[SnapshotKey, dict[int, SlotView]]:
        """What is committed now, sealed or not: by snapshot and rank."""
        found: dict[SnapshotKey, dict[int, SlotView]] = {}
        with self._lock:
            paths = sorted(self.folder.glob("rank-*.slot-*"))
            self._known = {path: known for path, known in self._known.items() if path in paths}
            self.skipped = {}
            for path in paths:
                known = self._look(path)
                if known is not None and known.head is not None:
                    found.setdefault(key_of(known.head), {})[known.head.rank] = known.view
        return found

    def durable(self) -> set[SnapshotKey]:
        """Of what the last look found, that which is to be made durable."""
        with self._lock:
            heads = [known.head for known in self._known.values() if known.head is not None]
        return {key_of(head) for head in heads if head.durable}

    def held_bytes(self) -> int:
        with self._lock:
            return sum(known.head.payload_bytes for known in self._known.values() if known.head is not None)

    def forget(self) -> None:
        """Let go of all files; they are unmapped with their last user."""
        with self._lock:
            self._known = {}

    def _look(self, path: Path) -> _Known | None:
        try:
            inode = path.stat().st_ino
            known = self._known.get(path)
            if known is None or known.inode != inode:
                known = _Known(inode, b"", SlotView.open(path), None)
            known = self._refresh(known)
        except FileNotFoundError:  # removed just now
            self._known.pop(path, None)
            return None
        except SlotError as error:
            self._known.pop(path, None)
            self.skipped[path] = str(error)
            return None
        self._known[path] = known
        return known

    def _refresh(self, known: _Known) -> _Known:
        try:
            front = bytes(known.view.image[:PAGE_BYTES])
            if front == known.front:
                return known
            head = known.view.head()
        except SlotChanged:  # open
            return _Known(known.inode, b"", known.view, None)
        if head.run != self._run:
            raise NotASlot(f"{known.view.name} belongs to run {head.run}, not to {self._run}")
        return _Known(known.inode, front, known.view, head)


def _shard(head: SlotHead) -> ShardFound:
    return ShardFound(
        rank=head.rank,
        world=head.world,
        ranges=head.ranges,
        state_bytes=head.state_bytes,
        skeleton=head.skeleton,
    )
