"""The keeper of a node: protects what the ranks there have captured, and answers questions about it.

Its process may die alone: its memory stays, and another takes it over after a while.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from snapshot.core.branches import Lineage
from snapshot.core.decoding import Decode, Piece
from snapshot.core.election import Elected
from snapshot.core.inventory import SnapshotKey
from snapshot.core.lifecycle import Ordinal

from .checkers import Violation
from .memory import GARBAGE, Content, Memory, ParityBlock, Ring, ordinal

if TYPE_CHECKING:
    from .world import World

MOST_TRIES = 5
MOST_POLLS = 8
LOOK_S = 0.25
END_LIMIT_S = 5.0


class Keeper:
    def __init__(self, world: World, memory: Memory, incarnation: int) -> None:
        self.world, self.memory, self.incarnation = world, memory, incarnation
        self.node = memory.node
        self.alive = True
        self._done: set[SnapshotKey] = set()
        """Protected, given up or overtaken."""
        self.sending: SnapshotKey | None = None
        self._saved: set[SnapshotKey] = set()
        """Written to storage, or given up."""
        self.later(world.rng.uniform(0.0, LOOK_S), self._look)

    def later(self, delay: float, action: Callable[[], None]) -> None:
        self.world.at(delay, lambda: self.alive and action())

    def learn(self, ring: Ring) -> None:
        self.memory.rings.setdefault(ring.generation, ring)

    def woken(self, everywhere: Ordinal | None) -> None:
        if everywhere is not None:
            self.memory.forget_older(everywhere, {member: rank.alive for member, rank in self.world.ranks.items()})
        self._protect_next()

    def _look(self) -> None:
        self._protect_next()
        self._save_next()
        self.later(LOOK_S, self._look)

    # Protection

    def _newer_than(self, key: SnapshotKey | None) -> list[SnapshotKey]:
        return [
            other
            for other in self.memory.complete_keys()
            if other not in self._done and (key is None or _order(other) > _order(key))
        ]

    def _protect_next(self) -> None:
        if self.sending is not None or not self.memory.slots:
            return
        waiting = self._newer_than(None)
        if not waiting:
            return
        key = max(waiting, key=_order)
        if len(waiting) > 1:
            self.world.seen["snapshot overtaken before it was protected"] += 1
        self._done.update(waiting)
        self.sending = key
        self._send(key, 1)

    def _send(self, key: SnapshotKey, tries: int) -> None:
        own, group = self.memory.own_image(key), self.memory.rings[key.generation].group
        if own is None or any(not slot.good for slot in self.memory.shares(key)):
            self._give_up(key)
            return
        peers = sorted({peer for index in group.classes_of(self.node) for peer in group.parity_nodes(index)})
        waiting, failed = set(peers), []
        self.world.faults.point_at_node("protecting", self.node)

        def arrived(peer: str) -> None:
            waiting.discard(peer)
            if not self._put(peer, key):
                failed.append(peer)
            if waiting or not self.alive:
                return
            if failed:
                self._again(key, tries)
            else:
                self._settle(key, tries, 0)

        for peer in peers:
            self.world.at(self.world.rng.uniform(0.01, 0.3), lambda peer=peer: arrived(peer))
        if not peers:
            self._protected(key)

    def _put(self, peer: str, key: SnapshotKey) -> bool:
        """This node's pieces arrive there, or break off."""
        world, group = self.world, self.memory.rings[key.generation].group
        there = world.keeper_of(peer)
        classes = [index for index in group.classes_of(self.node) if peer in group.parity_nodes(index)]
        broke = not world.healing and world.rng.random() < 0.04
        own = self.memory.own_image(key) if self.alive else None
        if there is None:
            return False
        blocks = [there.memory.parity.get((key, index)) for index in classes]
        if all(block is not None and self.node in block.images for block in blocks):
            return True  # to deliver what is there already changes nothing
        if own is None or broke:  # a partial sum can't be undone
            for index in classes:
                there.memory.parity.pop((key, index), None)
            world.seen["parity block spoiled"] += 1
            return False
        for index in classes:
            block = there.memory.parity.setdefault((key, index), ParityBlock(group))
            block.images[self.node] = own
        return True

    def _settle(self, key: SnapshotKey, tries: int, polls: int) -> None:
        """Protected when all that this node has data in is complete."""
        group = self.memory.rings[key.generation].group
        complete = True
        for index in group.classes_of(self.node):
            for peer in group.parity_nodes(index):
                there = self.world.keeper_of(peer)
                block = there.memory.parity.get((key, index)) if there is not None else None
                if there is None or block is None or self.node not in block.images:
                    self._again(key, tries)
                    return
                complete = complete and there.memory.is_complete(key, index)
        if complete:
            self._protected(key)
        elif polls >= MOST_POLLS or (polls > 2 and self._newer_than(key)):
            self._give_up(key)
        else:
            self.later(0.1, lambda: self._settle(key, tries, polls + 1))

    def _again(self, key: SnapshotKey, tries: int) -> None:
        if tries >= MOST_TRIES or self._newer_than(key):
            self._give_up(key)
        else:
            self.later(0.1 * tries, lambda: self._send(key, tries + 1))

    def _give_up(self, key: SnapshotKey) -> None:
        self.world.seen["protection given up"] += 1
        self.sending = None

    def _protected(self, key: SnapshotKey) -> None:
        if not self.memory.shares(key):
            self.world.seen["given up by a rank while it was protected"] += 1
            self._give_up(key)
            return
        self.sending = None
        self.memory.protected = max(self.memory.protected, (key.generation, ordinal(key).packed()))
        self.world.protected.settled(key, self.node)
        self.world.tell(f"{self.node} has protected {key}")
        self._protect_next()

    # Storage

    def _save_next(self) -> None:
        durable = {slot.key for slot in self.memory.slots.values() if slot.durable}
        waiting = [key for key in self.memory.complete_keys() if key in durable and key not in self._saved]
        if waiting:
            key = min(waiting, key=_order)
            self._saved.add(key)
            self.world.faults.point_at_node("saving", self.node)
            self.later(self.world.rng.uniform(0.01, 0.4), lambda: self._save(key))

    def _save(self, key: SnapshotKey) -> None:
        shares = self.memory.shares(key)
        breaks = not self.world.healing and self.world.rng.random() < 0.1
        if breaks or any(not slot.good for slot in shares):
            self.world.seen["a checkpoint could not be written"] += 1
        else:
            for slot in shares:
                self.world.storage.write(key, slot.rank, slot.state)
            if any(slot.rank == 0 for slot in shares):
                self._commit(key, shares[0].world)
        newest = ordinal(key)
        self.memory.settled = newest if self.memory.settled is None else max(self.memory.settled, newest)

    def _commit(self, key: SnapshotKey, world: int) -> None:
        lineage = Lineage(branches=self.world.plans_on_record[key.generation].branches)
        if self.world.storage.commit(key, world, self.world.now, lineage):
            self.world.seen["checkpoint committed"] += 1
            self.world.tell(f"{key} is durable")
            self.world.faults.durable()
        else:
            self.later(0.3, lambda: self._commit(key, world))

    # Questions

    def take_inventory(self, ended: tuple[int, ...], answer: Callable[[object], None]) -> None:
        """Not before these ranks have ended, which it sees to itself."""
        for member in ended:
            rank = self.world.ranks.get(member)
            if rank is not None and rank.node == self.node and rank.alive:
                self.later(
                    self.world.rng.uniform(0.001, 0.05), lambda member=member: self.world.kill_rank(member, "fenced")
                )
        self._look_when_ended(ended, self.world.now + END_LIMIT_S, answer)

    def _look_when_ended(self, ended: tuple[int, ...], deadline: float, answer: Callable[[object], None]) -> None:
        ranks = [self.world.ranks[member] for member in ended if member in self.world.ranks]
        if any(rank.alive and rank.node == self.node for rank in ranks):
            if self.world.now < deadline:
                self.later(0.02, lambda: self._look_when_ended(ended, deadline, answer))
            return

        def tell() -> None:
            self.world.emit("inventory", keeper=self, ended=ended)
            answer(self.memory.inventory())

        self.later(self.world.rng.uniform(0.01, 0.2), tell)

    def decode(self, elected: Elected, answer: Callable[[bool], None]) -> None:
        def work() -> None:
            whole = True
            for image in elected.images:
                if isinstance(image, Decode):
                    for piece in image.pieces:
                        if piece.decoder == self.node:
                            whole = self._decode(elected.key, image, piece) and whole
            answer(whole)

        self.later(self.world.rng.uniform(0.02, 0.4), work)

    def _decode(self, key: SnapshotKey, image: Decode, piece: Piece) -> bool:
        if len(piece.sources) + len(piece.zeros) != image.group.data:
            raise Violation("keeper", f"{piece} is decoded from another number of blocks than {image.group.data}")
        said: dict[str, set[Content]] = {}
        for source in piece.sources:
            there = self.world.keeper_of(source.held_by)
            read = there and there.memory.read_source(key, piece.class_index, source, image.group)
            if not read:
                self.world.seen["a source was gone when it was decoded"] += 1
                return False
            for node, content in read.items():
                said.setdefault(node, set()).add(content)
        agreed = all(len(contents) == 1 for contents in said.values()) and image.image.node in said
        self.memory.pieces[key, image.image.node, piece.piece] = said[image.image.node].pop() if agreed else GARBAGE
        return True

    def assemble(self, elected: Elected, answer: Callable[[bool], None]) -> None:
        def work() -> None:
            whole = True
            for image in elected.images:
                if isinstance(image, Decode) and (image.held_by or image.pieces[0].decoder) == self.node:
                    whole = self._assemble(elected.key, image) and whole
            answer(whole)

        self.later(self.world.rng.uniform(0.02, 0.3), work)

    def _assemble(self, key: SnapshotKey, image: Decode) -> bool:
        contents: set[Content] = set()
        for piece in image.pieces:
            there = self.world.keeper_of(piece.decoder)
            content = there and there.memory.pieces.get((key, image.image.node, piece.piece))
            if not content:
                self.world.seen["a piece was gone when its image was put together"] += 1
                return False
            contents.add(content)
        self.memory.decoded[key, image.image.node] = image.image, contents.pop() if len(contents) == 1 else GARBAGE
        self.world.seen["image decoded"] += 1
        return True


def _order(key: SnapshotKey) -> tuple[int, int, int]:
    """What the ranks that live now have captured goes before what is left of an earlier line of steps."""
    return (key.branch, key.generation, key.step)
