"""The facts about snapshots as JSON, there and back: in messages between keepers and in files.

Everything that is read is checked: ValueError, naming what is wrong, for what none of the `*_fields` has written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from snapshot.core.inventory import NodeImage, ParityFound, ShardFound, SnapshotKey
from snapshot.core.ranges import Range
from snapshot.core.stripes import Group

Fields: TypeAlias = "dict[str, Any]"


def key_fields(key: SnapshotKey) -> list[int]:
    return [key.attempt, key.branch, key.step, key.generation]


def key_from(value: object) -> SnapshotKey:
    attempt, branch, step, generation = (whole(number, "key") for number in sequence(value, "key", 4))
    return SnapshotKey(attempt=attempt, branch=branch, step=step, generation=generation)


def group_fields(group: Group) -> Fields:
    return {"nodes": list(group.nodes), "parity": group.parity}


def group_from(value: object) -> Group:
    fields = mapping(value, "group")
    nodes = tuple(text(node, "group: nodes") for node in sequence(fields.get("nodes"), "group: nodes"))
    return Group(nodes=nodes, parity=whole(fields.get("parity"), "group: parity"))


def image_fields(image: NodeImage) -> Fields:
    shards = [[s.rank, s.world, [list(each) for each in s.ranges], s.state_bytes, s.skeleton] for s in image.shards]
    return {"node": image.node, "image_bytes": image.image_bytes, "shards": shards}


def image_from(value: object) -> NodeImage:
    fields = mapping(value, "image")
    return NodeImage(
        node=text(fields.get("node"), "image: node"),
        image_bytes=whole(fields.get("image_bytes"), "image: image_bytes"),
        shards=tuple(_shard_from(shard) for shard in sequence(fields.get("shards"), "image: shards")),
    )


def parity_fields(found: ParityFound) -> Fields:
    return {
        "key": key_fields(found.key),
        "ring": found.ring,
        "group": group_fields(found.group),
        "class": found.class_index,
        "row": found.row,
        "images": [image_fields(image) for image in found.images],
    }


def parity_from(value: object) -> ParityFound:
    fields = mapping(value, "parity")
    return ParityFound(
        key=key_from(fields.get("key")),
        ring=whole(fields.get("ring"), "parity: ring"),
        group=group_from(fields.get("group")),
        class_index=whole(fields.get("class"), "parity: class"),
        row=whole(fields.get("row"), "parity: row"),
        images=tuple(image_from(image) for image in sequence(fields.get("images"), "parity: images")),
    )


def whole(value: object, name: str) -> int:
    """A count: an integer of at least 0 that fits into 63 bits."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{name}: got {value!r:.80}, must be an integer within 0..2**63-1")
    return value


def text(value: object, name: str) -> str:
    if type(value) is not str or not 0 < len(value) <= 255:
        raise ValueError(f"{name}: got {value!r:.80}, must be text of 1..255 characters")
    return value


def mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: got {value!r:.80}, must be a JSON object")
    return value


def sequence(value: object, name: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError(f"{name}: got {value!r:.80}, must be a list" + (f" of {length}" if length else ""))
    return value


def _range_from(value: object) -> Range:
    start, stop = sequence(value, "shard: ranges", 2)
    return whole(start, "shard: ranges"), whole(stop, "shard: ranges")


def _shard_from(value: object) -> ShardFound:
    rank, world, ranges, state_bytes, skeleton = sequence(value, "shard", 5)
    return ShardFound(
        rank=whole(rank, "shard: rank"),
        world=whole(world, "shard: world"),
        ranges=tuple(_range_from(each) for each in sequence(ranges, "shard: ranges")),
        state_bytes=whole(state_bytes, "shard: state_bytes"),
        skeleton=text(skeleton, "shard: skeleton"),
    )
