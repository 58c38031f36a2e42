"""A node's shared memory, by facts instead of bytes: what its ranks and its keeper have put there.

A share carries the state itself, as truth.py has it, so that a checker can tell whether what is read back is the
true state of its step. A parity block is the set of the images that it covers, a decoded piece what its sources say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from resilient.core.plan import Plan
from snapshot.core.decoding import Source
from snapshot.core.inventory import ImageFound, Inventory, NodeImage, ParityFound, ShardFound, SnapshotKey
from snapshot.core.lifecycle import Ordinal
from snapshot.core.stripes import PAGE_BYTES, Group, groups

from .truth import NO_VALUE, NOBODYS, Held

Content = tuple[tuple[int, Held], ...]
"""(rank, state) of every share in an image."""
GARBAGE: Content = ((-1, ((NOBODYS, NO_VALUE),)),)
SHARE_BYTES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """The stripes of one generation: the group of a keeper, and the ranks on each of its nodes."""

    generation: int
    group: Group
    shares: dict[str, tuple[int, ...]]


def rings(plan: Plan, parity: int) -> dict[str, Ring]:
    """By node of the plan."""
    shares: dict[str, tuple[int, ...]] = {}
    for rank, place in enumerate(plan.places):
        shares[place.node] = (*shares.get(place.node, ()), rank)
    return {
        node: Ring(generation=plan.generation, group=group, shares={member: shares[member] for member in group.nodes})
        for group in groups([(node, node) for node in shares], parity)
        for node in group.nodes
    }


def ordinal(key: SnapshotKey) -> Ordinal:
    return Ordinal(key.branch, key.step)


def pages(key: SnapshotKey, rank: int) -> int:
    """Shares are of different lengths, so that pieces are ragged, and some empty."""
    return 1 + (key.step + rank) % 3


@dataclass(slots=True, kw_only=True)
class SlotFile:
    key: SnapshotKey
    member: int
    rank: int
    world: int
    state: Held
    durable: bool = False
    committed: bool = False
    damaged_page: int | None = None
    headless: bool = False
    """Not even its head can be read any more."""

    @property
    def good(self) -> bool:
        return self.committed and self.damaged_page is None and not self.headless


@dataclass(slots=True)
class ParityBlock:
    group: Group
    images: dict[str, tuple[NodeImage, Content]] = field(default_factory=dict)
    rotten: bool = False


@dataclass(slots=True)
class Memory:
    node: str
    slots: dict[tuple[int, int], SlotFile] = field(default_factory=dict)
    """By member and number of the slot."""
    parity: dict[tuple[SnapshotKey, int], ParityBlock] = field(default_factory=dict)
    """By snapshot and class."""
    pieces: dict[tuple[SnapshotKey, str, int], Content] = field(default_factory=dict)
    """Decoded here: by snapshot, node and number."""
    decoded: dict[tuple[SnapshotKey, str], tuple[NodeImage, Content]] = field(default_factory=dict)
    """Whole images, put together here."""
    rings: dict[int, Ring] = field(default_factory=dict)
    protected: tuple[int, int] = (0, -1)
    """The words that the ranks here read: the newest snapshot protected from here, as generation and packed ordinal."""
    settled: Ordinal | None = None
    """The newest snapshot that its keeper has written to storage, or given up."""

    # Images

    def shares(self, key: SnapshotKey) -> list[SlotFile]:
        """The committed shares of this snapshot if all of this node's are there, in order of rank."""
        ring = self.rings.get(key.generation)
        found = {slot.rank: slot for slot in self.slots.values() if slot.committed and slot.key == key}
        if ring is None or tuple(sorted(found)) != ring.shares.get(self.node):
            return []
        return [found[rank] for rank in sorted(found)]

    def complete_keys(self) -> list[SnapshotKey]:
        """Of which all of this node's shares are here."""
        return [key for key in {slot.key for slot in self.slots.values() if slot.committed} if self.shares(key)]

    def own_image(self, key: SnapshotKey) -> tuple[NodeImage, Content] | None:
        shares = self.shares(key)
        if not shares:
            return None
        shards = tuple(
            ShardFound(
                rank=slot.rank,
                world=slot.world,
                ranges=((slot.rank * SHARE_BYTES, (slot.rank + 1) * SHARE_BYTES),),
                state_bytes=slot.world * SHARE_BYTES,
                skeleton="same",
            )
            for slot in shares
        )
        length = PAGE_BYTES * sum(pages(key, slot.rank) for slot in shares)
        content = tuple((slot.rank, slot.state) for slot in shares)
        return NodeImage(node=self.node, image_bytes=length, shards=shards), content

    def bad_pieces(self, key: SnapshotKey) -> tuple[int, ...]:
        """Of the own image."""
        bad, page, group = set(), 0, self.rings[key.generation].group
        image = self.own_image(key)
        assert image is not None
        for slot in self.shares(key):
            if slot.damaged_page is not None:
                bad.add((page + slot.damaged_page) * PAGE_BYTES // group.piece_bytes(image[0].image_bytes))
            page += pages(key, slot.rank)
        return tuple(sorted(bad))

    # Told to the controller

    def inventory(self) -> Inventory:
        images = []
        for key in self.complete_keys():
            own = self.own_image(key)
            assert own is not None
            images.append(
                ImageFound(
                    key=key,
                    ring=key.generation,
                    image=own[0],
                    bad_pieces=self.bad_pieces(key),
                    readable=not any(slot.headless for slot in self.shares(key)),
                )
            )
        for (key, _), (image, _) in self.decoded.items():
            images.append(ImageFound(key=key, ring=key.generation, image=image))
        parities = [
            ParityFound(
                key=key,
                ring=key.generation,
                group=block.group,
                class_index=class_index,
                row=self.row(block.group, class_index),
                images=tuple(block.images[node][0] for node in sorted(block.images)),
            )
            for (key, class_index), block in self.parity.items()
            if self.is_complete(key, class_index) and not block.rotten
        ]
        return Inventory(keeper=self.node, images=tuple(images), parities=tuple(parities))

    def row(self, group: Group, class_index: int) -> int:
        row = group.row_of(self.node, class_index)
        assert row is not None
        return row

    def is_complete(self, key: SnapshotKey, class_index: int) -> bool:
        """Whether every data node of the class has delivered its piece."""
        block = self.parity.get((key, class_index))
        return block is not None and set(block.images) == set(block.group.data_nodes(class_index))

    # Served to others

    def read_share(self, key: SnapshotKey, node: str, rank: int) -> Held | None:
        """The state in this share; None if it is not here, or fails its checksums."""
        if node == self.node:
            for slot in self.slots.values():
                if slot.key == key and slot.rank == rank and slot.good:
                    return slot.state
        _, content = self.decoded.get((key, node), (None, ()))
        return dict(content).get(rank)

    def read_source(
        self, key: SnapshotKey, class_index: int, source: Source, group: Group
    ) -> dict[str, Content] | None:
        """What this block says of which nodes; None if it is not here, or fails its checksums."""
        if source.node is None:
            block = self.parity.get((key, class_index))
            if block is None or block.rotten or not self.is_complete(key, class_index):
                return None
            if source.index != group.data + self.row(group, class_index):
                return None
            return {node: content for node, (_, content) in block.images.items()}
        if source.node == self.node:
            own = self.own_image(key)
            piece = group.piece_of(source.node, class_index)
            headless = any(slot.headless for slot in self.shares(key))
            if own is not None and not headless and piece not in self.bad_pieces(key):
                return {source.node: own[1]}
        if (key, source.node) in self.decoded:
            return {source.node: self.decoded[key, source.node][1]}
        return None

    # Making room

    def forget_older(self, everywhere: Ordinal, is_alive: dict[int, bool]) -> None:
        """What is older than a snapshot that is protected everywhere: parity, what was decoded, dead ranks' slots."""
        self.parity = {at: block for at, block in self.parity.items() if ordinal(at[0]) >= everywhere}
        self.decoded = {at: image for at, image in self.decoded.items() if ordinal(at[0]) >= everywhere}
        self.pieces = {at: piece for at, piece in self.pieces.items() if ordinal(at[0]) >= everywhere}
        self.slots = {
            at: slot for at, slot in self.slots.items() if ordinal(slot.key) >= everywhere or is_alive[slot.member]
        }
