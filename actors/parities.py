"""The parity blocks in one keeper's memory: where the data of its peers is added up.

    (nothing) --first PUT--> open --all data has come--> complete --older than what is protected everywhere--> free
                              |
                              +--a PUT broke off, or a newer snapshot has overtaken it--> dropped --> free

Rules
    * What broken PUTs have added can't be told apart, so their block is dropped, and the next PUT begins a new one.
      Whoever had delivered is told to do so again when he asks whether it is settled. Nothing is said twice: to
      deliver what is there already changes nothing.
    * Nobody writes into a dropped block's memory again; it is used for another one when the last PUT has left it.
    * A block counts when its commit word is written. What a former keeper has left uncommitted is free memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from actors import agenda
from actors.agenda import BlockState
from actors.block import Block
from actors.pool import ParityPool
from actors.ring import Ring
from actors.transfer import Stream
from snapshot.codec import Codec
from snapshot.core.inventory import NodeImage, SnapshotKey
from snapshot.core.lifecycle import Ordinal
from snapshot.fields import Fields, image_from, key_from, whole
from snapshot.parity import NotParity, ParityFile, RottenParity
from snapshot.room import NoRoom

SETTLE_LIMIT_S = 2.0
"""So long a question whether blocks are complete waits for its answer; then it is "not yet"."""
RING_LIMIT_S = 2.0
"""So long a PUT waits for its ring, which the controller may be about to tell."""


class Parities:
    """All of them, in one folder. Any thread may call, and several do at once."""

    def __init__(self, *, run: str, node: str, folder: Path, ring_of: Callable[[int], Ring | None]) -> None:
        """ring_of: the ring of a generation, None as long as it is not known; then `ring_known` is to be called."""
        self._run = run
        self._node = node
        self._folder = folder
        self._ring_of = ring_of
        self._changed = threading.Condition()
        self._blocks: dict[tuple[SnapshotKey, int], Block] = {}
        self._pool = ParityPool(folder)
        self._latest: dict[str, SnapshotKey] = {}
        """By node, the newest snapshot that it has sent anything of."""
        self._everywhere: Ordinal | None = None
        self._closing = False
        self.received_bytes = 0
        self.dropped: Counter[str] = Counter()
        """Blocks that were lost before their time, by reason."""
        self._adopt()

    def put(self, request: Fields, stream: Stream) -> Fields:
        """Adds a piece of a node image to its block. ValueError refuses it."""
        key, class_index = key_from(request.get("key")), whole(request.get("class"), "class")
        image = image_from(request.get("image"))
        ring = self._ring(key.generation)
        if image.node not in (ring.origins(class_index) if class_index in ring.group.classes else ()):
            raise ValueError(f"class {class_index}: node {image.node} has no data in it, in ring {ring.generation}")
        block = self._join(ring, key, class_index, image)
        if block is None:
            return {"have": True}
        try:
            self._receive(block, image, stream)
            self._deliver(block, image)
        except BaseException as error:  # Whatever it was, part of the piece may have been added.
            self._spoil(block, type(error).__name__)
            raise
        finally:
            self._leave(block, image.node)
        return {"have": True}

    def settled(self, request: Fields) -> Fields:
        """Whether blocks are complete: those that are, and those that the node must deliver (again)."""
        key, node = key_from(request.get("key")), str(request.get("node"))
        classes = [whole(number, "classes") for number in request.get("classes", [])]
        deadline = time.monotonic() + SETTLE_LIMIT_S
        with self._changed:
            while True:
                found = {number: self._blocks.get((key, number)) for number in classes}
                complete = [number for number, block in found.items() if block and block.state == "complete"]
                again = [
                    number
                    for number, block in found.items()
                    if block is None or (number not in complete and node not in block.delivered)
                ]
                left_s = deadline - time.monotonic()
                if again or len(complete) == len(classes) or left_s <= 0 or self._closing:
                    return {"complete": complete, "again": again}
                self._changed.wait(left_s)

    def protected(self, everywhere: Ordinal) -> None:
        """This snapshot is protected on all nodes: what is older may go."""
        with self._changed:
            if self._everywhere is None or everywhere > self._everywhere:
                self._everywhere = everywhere
                self._drop_surplus()

    def ring_known(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def complete(self) -> list[Block]:
        with self._changed:
            return [block for block in self._blocks.values() if block.state == "complete"]

    @contextlib.contextmanager
    def reading(self, key: SnapshotKey, class_index: int, row: int) -> Iterator[memoryview]:
        """A complete block's bytes, which stay what they are meanwhile. KeyError if there is none."""
        with self._changed:
            block = self._blocks.get((key, class_index))
            if block is None or block.state != "complete" or block.row != row or block.file is None:
                raise KeyError(f"no parity block {row} of class {class_index} of {key} on node {self._node}")
            block.users += 1
        try:
            yield block.file.payload.toreadonly()
        finally:
            self._leave(block, None)

    def drop_rotten(self, block: Block) -> None:
        with self._changed:
            self._drop(block, "rotten")

    def held_bytes(self) -> int:
        with self._changed:
            held = sum(block.file.held_bytes for block in self._blocks.values() if block.file is not None)
            return held + self._pool.held_bytes()

    def close(self) -> None:
        """Nobody waits in here any more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _adopt(self) -> None:
        for path in sorted(self._folder.glob("parity-*")):
            try:
                file = ParityFile.open(path)
                head = file.read()
            except (NotParity, RottenParity) as error:
                self.dropped[type(error).__name__] += 1
                path.unlink()
                continue
            ring = self._ring_of(head.found.ring) if head else None
            if head is None or ring is None or head.run != self._run or ring.group != head.found.group:
                self._pool.give(file)
                continue
            found = head.found
            block = Block(found.key, ring, found.class_index, found.row, state="complete", file=file)
            block.delivered = {image.node: image for image in found.images}
            self._blocks[found.key, found.class_index] = block

    def _ring(self, generation: int) -> Ring:
        deadline = time.monotonic() + RING_LIMIT_S
        with self._changed:
            while (ring := self._ring_of(generation)) is None:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._closing:
                    raise ValueError(f"generation {generation}: its ring is not known on node {self._node}")
                self._changed.wait(left_s)
        return ring

    def _join(self, ring: Ring, key: SnapshotKey, class_index: int, image: NodeImage) -> Block | None:
        """The block to add to; None if the image's piece is in it already."""
        row = ring.group.row_of(self._node, class_index)
        if row is None:
            raise ValueError(f"class {class_index}: node {self._node} holds no parity of it, in ring {ring.generation}")
        with self._changed:
            if self._everywhere is not None and agenda.ordinal(key) < self._everywhere:
                raise ValueError(f"{key}: {self._everywhere} is protected everywhere, nobody needs this any more")
            self._note_sent(image.node, key)
            block = self._blocks.get((key, class_index))
            if block is not None and image.node in block.delivered:
                if block.delivered[image.node] != image:
                    raise ValueError(f"{key}: node {image.node} had another image in class {class_index} before")
                return None
            if block is not None and image.node in block.delivering:
                self._drop(block, "sent again")
                block = None
            if block is None:
                block = self._begin(Block(key, ring, class_index, row), image.node)
            block.delivering.add(image.node)
            block.users += 1
            return block

    def _note_sent(self, node: str, key: SnapshotKey) -> None:
        """Called with the lock."""
        for told in agenda.overtaken((block.told for block in self._blocks.values()), node, key):
            self._drop(self._blocks[told.key, told.class_index], "overtaken")
        if node not in self._latest or agenda.in_time(key) > agenda.in_time(self._latest[node]):
            self._latest[node] = key

    def _begin(self, block: Block, node: str) -> Block:
        """Called with the lock, for a block's first data. ValueError if it can't become complete, or has no room."""
        others = [other for other in block.ring.origins(block.class_index) if other != node]
        if gone_on := agenda.hopeless(self._latest, others, block.key):
            raise ValueError(f"{block.key}: node {gone_on} has sent a newer snapshot, and will not send this one")
        if block.told in self._drop_surplus(block.told):
            raise ValueError(f"{block.key}: there is no room beside newer ones on node {self._node}")
        self._blocks[block.key, block.class_index] = block
        return block

    def _receive(self, block: Block, image: NodeImage, stream: Stream) -> None:
        group = block.ring.group
        start, stop = group.piece_bounds(group.piece_of(image.node, block.class_index), image.image_bytes)
        length = stop - start
        with block.lock:
            payload = self._make_room(block, group.piece_bytes(image.image_bytes))
        if group.data == 1:  # The only data block, so parity is a copy of it: no need to add.
            payload[length:] = bytes(len(payload) - length)
            assert block.file is not None
            stream.receive_into(payload[:length], block.file.note_sum)
        else:
            self._add(block, group.data_nodes(block.class_index).index(image.node), length, stream)
        with self._changed:
            self.received_bytes += length

    def _add(self, block: Block, column: int, length: int, stream: Stream) -> None:
        codec = Codec(block.ring.group.data, block.ring.group.parity)
        at = 0
        for frame in stream.frames():
            if at + len(frame) > length:
                raise ValueError(f"the piece is longer than {length} bytes")
            with block.lock:
                if block.state != "open" or block.file is None:
                    raise ValueError(f"{block.key}: the block of class {block.class_index} was dropped meanwhile")
                codec.update(block.row, column, frame, block.file.payload[at : at + len(frame)])
            at += len(frame)
        if at != length:
            raise ValueError(f"the piece has {at} bytes, not {length}")

    def _make_room(self, block: Block, block_bytes: int) -> memoryview:
        """Called with the block's lock. The block has at least this length then, with what was in it."""
        former = block.file
        if former is not None and former.fits(block_bytes):
            former.extend(block_bytes)
            return former.payload
        try:
            file = self._pool.take(block_bytes)
        except NoRoom as error:
            raise ValueError(str(error)) from error
        file.begin(block_bytes, zeros=block.ring.group.data > 1)
        if former is not None:
            file.payload[: former.block_bytes] = former.payload
        with self._changed:
            block.file = file
        if former is not None:
            self._pool.give(former)
        return file.payload

    def _deliver(self, block: Block, image: NodeImage) -> None:
        with self._changed:
            if block.state != "open":
                raise ValueError(f"{block.key}: the block of class {block.class_index} was dropped meanwhile")
            block.delivered[image.node] = image
            if block.told.missing:
                return
        assert block.file is not None
        with block.lock:
            block.file.commit(self._run, block.found)
        with self._changed:
            if block.state == "open":
                block.state = "complete"
            self._changed.notify_all()

    def _spoil(self, block: Block, reason: str) -> None:
        with self._changed:
            self._drop(block, reason)

    def _leave(self, block: Block, node: str | None) -> None:
        with self._changed:
            block.users -= 1
            if node is not None:
                block.delivering.discard(node)
            self._recycle(block)

    def _drop_surplus(self, *arriving: BlockState) -> list[BlockState]:
        """Called with the lock. What was too much, which may be what arrives."""
        dropped = agenda.surplus([*(block.told for block in self._blocks.values()), *arriving], self._everywhere)
        for state in dropped:
            if block := self._blocks.get((state.key, state.class_index)):
                self._drop(block, "")
        return dropped

    def _drop(self, block: Block, reason: str) -> None:
        """Called with the lock. reason: empty if it is its time."""
        if block.state == "dropped":
            return
        block.state = "dropped"
        if self._blocks.get((block.key, block.class_index)) is block:
            del self._blocks[block.key, block.class_index]
        if reason:
            self.dropped[reason] += 1
        self._recycle(block)
        self._changed.notify_all()

    def _recycle(self, block: Block) -> None:
        """Called with the lock. Whoever is still in a dropped block may yet write into its memory, or read it."""
        if block.state == "dropped" and block.users == 0 and block.file is not None:
            self._pool.give(block.file)
            block.file = None
