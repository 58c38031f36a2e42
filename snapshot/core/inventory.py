"""What keepers say that they hold: the facts that an election decides on."""

from __future__ import annotations

from dataclasses import dataclass

from snapshot.core.branches import Lineage
from snapshot.core.ranges import Ranges, check_ranges
from snapshot.core.stripes import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotKey:
    """Which snapshot: the state of a branch at the start of a step, as one generation has cut it into shards."""

    attempt: int
    branch: int
    step: int
    generation: int

    @property
    def newness(self) -> tuple[int, int, int, int]:
        """The greater, the newer."""
        return (self.branch, self.step, self.generation, self.attempt)

    def __str__(self) -> str:
        return f"step {self.step} of branch {self.branch} (generation {self.generation}, attempt {self.attempt})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFound:
    """Some bytes of a state of `state_bytes`, as captured by `rank` of `world`.

    ranges: which; see `core.ranges`. skeleton: digest of the state's skeleton.
    """

    rank: int
    world: int
    ranges: Ranges
    state_bytes: int
    skeleton: str

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank: got {self.rank}, must be 0..{self.world - 1}")
        try:
            check_ranges(self.ranges, self.state_bytes)
        except ValueError as error:
            raise ValueError(f"rank {self.rank}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeImage:
    """What there is to know of a node image, whoever tells: where it comes from, its length and its shards."""

    node: str
    image_bytes: int
    shards: tuple[ShardFound, ...] = ()

    def __post_init__(self) -> None:
        if self.image_bytes < 0:
            raise ValueError(f"node {self.node}: image_bytes: got {self.image_bytes}, must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFound:
    """A sealed node image in a keeper's memory: its own node's, or one that it has decoded.

    ring: numbers the cut of nodes into groups that the snapshot was protected with.
    bad_pieces: those of its pieces (see `stripes`) that fail their checksums.
    readable: False if not even its head can be trusted; then only `image.node` is.
    """

    key: SnapshotKey
    ring: int
    image: NodeImage
    bad_pieces: tuple[int, ...] = ()
    readable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityFound:
    """A complete parity block: one row of one class of a group.

    images: of the class's data nodes, those that it covers; the others had none.
    """

    key: SnapshotKey
    ring: int
    group: Group
    class_index: int
    row: int
    images: tuple[NodeImage, ...]

    def __post_init__(self) -> None:
        if self.class_index not in self.group.classes:
            raise ValueError(f"class_index: got {self.class_index}, must be 0..{self.group.size - 1}")
        if not 0 <= self.row < self.group.parity:
            raise ValueError(f"row: got {self.row}, must be 0..{self.group.parity - 1} in group {self.group}")
        covered, data = [image.node for image in self.images], self.group.data_nodes(self.class_index)
        if len(set(covered)) != len(covered) or not set(covered) <= set(data):
            raise ValueError(f"images: got those of {covered}, must be of different nodes of {data}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All that the live keeper of a node holds."""

    keeper: str
    images: tuple[ImageFound, ...] = ()
    parities: tuple[ParityFound, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFound:
    """A complete checkpoint on storage. lineage: the run's branches when it was written. folder: where it is."""

    key: SnapshotKey
    lineage: Lineage
    folder: str

    @property
    def newness(self) -> tuple[int, int, int, int]:
        """The greater, the newer. A later attempt has decided what to go on from: what it wrote counts first."""
        return (self.key.attempt, self.key.branch, self.key.step, self.key.generation)
