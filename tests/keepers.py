"""What keepers would report of snapshots, for tests that take some of it away."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from snapshot.core.inventory import ImageFound, Inventory, NodeImage, ParityFound, ShardFound, SnapshotKey
from snapshot.core.ranges import merged
from snapshot.core.stripes import Group

STATE_BYTES = 1000


def key_of(step: int, *, branch: int = 0, generation: int = 1) -> SnapshotKey:
    return SnapshotKey(attempt=1, branch=branch, step=step, generation=generation)


def images_of(image_bytes: Mapping[str, int]) -> dict[str, NodeImage]:
    """One rank per node, in order; a node with 0 bytes has none."""
    nodes = [node for node, length in image_bytes.items() if length]
    cuts = [STATE_BYTES * rank // len(nodes) for rank in range(len(nodes) + 1)]
    return {
        node: NodeImage(
            node=node,
            image_bytes=image_bytes[node],
            shards=(
                ShardFound(
                    rank=rank,
                    world=len(nodes),
                    ranges=merged([(cuts[rank], cuts[rank + 1])]),
                    state_bytes=STATE_BYTES,
                    skeleton="5ce1",
                ),
            ),
        )
        for rank, node in enumerate(nodes)
    }


def protected(
    key: SnapshotKey, groups: Sequence[Group], image_bytes: Mapping[str, int], ring: int = 1
) -> list[Inventory]:
    """The inventories of all keepers when a snapshot is protected."""
    images = images_of(image_bytes)
    return [
        Inventory(
            keeper=node,
            images=tuple(ImageFound(key=key, ring=ring, image=images[name]) for name in (node,) if name in images),
            parities=tuple(
                ParityFound(
                    key=key,
                    ring=ring,
                    group=group,
                    class_index=class_index,
                    row=row,
                    images=tuple(images[name] for name in group.data_nodes(class_index) if name in images),
                )
                for class_index in group.classes
                if (row := group.row_of(node, class_index)) is not None
            ),
        )
        for group in groups
        for node in group.nodes
    ]


def left(
    *snapshots: Sequence[Inventory], lost: Collection[str] = (), rotten: Mapping[str, tuple[int, ...]] | None = None
) -> list[Inventory]:
    """What the surviving keepers hold of several snapshots. rotten: bad pieces of images, by keeper."""
    found = [inventory for snapshot in snapshots for inventory in snapshot if inventory.keeper not in lost]
    return [
        Inventory(
            keeper=keeper,
            images=tuple(
                replace(image, bad_pieces=(rotten or {}).get(keeper, ()))
                for inventory in found
                if inventory.keeper == keeper
                for image in inventory.images
            ),
            parities=tuple(
                parity for inventory in found if inventory.keeper == keeper for parity in inventory.parities
            ),
        )
        for keeper in sorted({inventory.keeper for inventory in found})
    ]
