"""What is left of each snapshot, as far as the keepers' inventories agree.

Facts that contradict each other are all left aside, as nothing here can tell which is true: to find an older
snapshot is better than to decode garbage. An image outweighs a parity block, because it describes itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from snapshot.core.inventory import ImageFound, Inventory, NodeImage, ParityFound, SnapshotKey
from snapshot.core.stripes import Group

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """An image in the memory of a live keeper; `bad_pieces` of it can't be read."""

    held_by: str
    bad_pieces: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One snapshot, protected with one ring.

    known: by node, its image; nodes that are known to have had none are here with 0 bytes.
    copies: by node, where its image can be read; those with fewest bad pieces first, then the node's own keeper.
    parities: by group and class, then by row, the keepers that hold the block.
    groups: by node.
    ignored: what was left aside, and why.
    """

    key: SnapshotKey
    ring: int
    known: Mapping[str, NodeImage]
    copies: Mapping[str, tuple[Copy, ...]]
    parities: Mapping[tuple[Group, int], Mapping[int, tuple[str, ...]]]
    groups: Mapping[str, Group]
    ignored: tuple[str, ...]

    def whole(self, node: str) -> str | None:
        """The keeper to read the node's whole image from, if there is one."""
        return next((copy.held_by for copy in self.copies.get(node, ()) if not copy.bad_pieces), None)


def gather(inventories: Sequence[Inventory]) -> tuple[Evidence, ...]:
    """The evidence for every snapshot that an inventory names, newest first; of two rings the later first."""
    keepers = [inventory.keeper for inventory in inventories]
    if len(set(keepers)) != len(keepers):
        raise ValueError(f"inventories: got keepers {sorted(keepers)}, must be one of each")
    images: dict[tuple[SnapshotKey, int], list[tuple[str, ImageFound]]] = defaultdict(list)
    parities: dict[tuple[SnapshotKey, int], list[tuple[str, ParityFound]]] = defaultdict(list)
    for inventory in sorted(inventories, key=lambda inventory: inventory.keeper):
        for image in inventory.images:
            images[image.key, image.ring].append((inventory.keeper, image))
        for parity in inventory.parities:
            parities[parity.key, parity.ring].append((inventory.keeper, parity))
    found = sorted({*images, *parities}, key=lambda known: (known[0].newness, known[1]), reverse=True)
    return tuple(_judge(key, ring, images[key, ring], parities[key, ring]) for key, ring in found)


def _judge(
    key: SnapshotKey, ring: int, images: list[tuple[str, ImageFound]], parities: list[tuple[str, ParityFound]]
) -> Evidence:
    ignored: list[str] = []
    images = _agreeing_images(images, ignored)
    parities = _agreeing_parities(parities, {found.image.node: found.image for _, found in images}, ignored)
    groups = {node: found.group for _, found in parities for node in found.group.nodes}
    images = _with_possible_pieces(images, groups, ignored)
    known = {image.node: image for _, found in parities for image in _covered(found)}
    known |= {found.image.node: found.image for _, found in images}
    blocks: dict[tuple[Group, int], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for keeper, parity in parities:
        blocks[parity.group, parity.class_index][parity.row].append(keeper)
    return Evidence(
        key=key,
        ring=ring,
        known=known,
        copies=_copies(images),
        parities={
            block: {row: tuple(sorted(set(rows[row]))) for row in sorted(rows)} for block, rows in blocks.items()
        },
        groups=groups,
        ignored=tuple(f"{key}: {reason}" for reason in ignored),
    )


def _agreeing_images(images: list[tuple[str, ImageFound]], ignored: list[str]) -> list[tuple[str, ImageFound]]:
    disputed = _disputed((found.image.node, found.image) for _, found in images if found.readable)
    kept = []
    for keeper, found in images:
        if not found.readable:
            ignored.append(f"the image of node {found.image.node} on keeper {keeper} is unreadable")
        elif found.image.node in disputed:
            ignored.append(
                f"the image of node {found.image.node} on keeper {keeper} differs from another one in length or shards"
            )
        else:
            kept.append((keeper, found))
    return kept


def _with_possible_pieces(
    images: list[tuple[str, ImageFound]], groups: Mapping[str, Group], ignored: list[str]
) -> list[tuple[str, ImageFound]]:
    kept = []
    for keeper, found in images:
        group = groups.get(found.image.node)
        if group and not set(found.bad_pieces) <= set(range(group.data)):
            ignored.append(
                f"the image of node {found.image.node} on keeper {keeper} has bad pieces {found.bad_pieces}, "
                f"where there are only {group.data}"
            )
        else:
            kept.append((keeper, found))
    return kept


def _agreeing_parities(
    parities: list[tuple[str, ParityFound]], images: Mapping[str, NodeImage], ignored: list[str]
) -> list[tuple[str, ParityFound]]:
    kept = []
    for keeper, found in parities:
        wrong = [image.node for image in _covered(found) if images.get(image.node, image) != image]
        if wrong:
            ignored.append(f"{_shown(keeper, found)} covers another image of node {', '.join(wrong)} than was found")
        else:
            kept.append((keeper, found))
    disputed = _disputed((image.node, image) for _, found in kept for image in _covered(found))
    disputed |= _disputed((node, found.group) for _, found in kept for node in found.group.nodes)
    for keeper, found in kept:
        if disputed & set(found.group.nodes):
            ignored.append(f"{_shown(keeper, found)} disagrees with another one on what it covers")
    return [(keeper, found) for keeper, found in kept if not disputed & set(found.group.nodes)]


def _covered(parity: ParityFound) -> list[NodeImage]:
    """The images of all data nodes of the class; one that is not listed had none."""
    listed = {image.node: image for image in parity.images}
    nodes = parity.group.data_nodes(parity.class_index)
    return [listed.get(node, NodeImage(node=node, image_bytes=0)) for node in nodes]


def _disputed(claims: Iterable[tuple[Key, Value]]) -> set[Key]:
    """Of what different things are claimed."""
    first: dict[Key, Value] = {}
    return {key for key, value in claims if first.setdefault(key, value) != value}


def _copies(images: list[tuple[str, ImageFound]]) -> dict[str, tuple[Copy, ...]]:
    copies: dict[str, list[Copy]] = defaultdict(list)
    for keeper, found in images:
        copies[found.image.node].append(Copy(held_by=keeper, bad_pieces=frozenset(found.bad_pieces)))
    return {
        node: tuple(sorted(held, key=lambda copy: (len(copy.bad_pieces), copy.held_by != node, copy.held_by)))
        for node, held in copies.items()
    }


def _shown(keeper: str, parity: ParityFound) -> str:
    return f"parity block {parity.row} of class {parity.class_index} of group {parity.group} on keeper {keeper}"
