"""What the controller can learn. Every event is a fact that may arrive late, twice or out of order."""

from __future__ import annotations

from dataclasses import dataclass

from snapshot.core.digest import StatePart
from snapshot.core.inventory import CheckpointFound, Inventory

from .plan import Address, Plan
from .seat import SeatReport


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSeen:
    """The cluster lists this node as alive. Repeated as long as it does."""

    node: str
    capacity: int
    """How many ranks fit on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoNodeFits:
    """Why none of the nodes that are there can hold a rank; "" if some can, or if nothing is known against them."""

    why: str
    hopeless: bool = False
    """Other nodes would fare no better: it is the user's settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGone:
    node: str
    why: str
    silent_s: float = 0.0
    """Seconds between its last sign of life and this verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLeaving:
    """This node is to be let go: it was asked for, or the cluster says so. Repeated as long as it does."""

    node: str
    why: str
    left_s: float = float("inf")
    """How long it still lives, as far as is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLeaving:
    """This rank is to leave; its node may get another one."""

    member: int
    why: str
    left_s: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotProtected:
    """A snapshot that the members of this generation captured is protected on all their nodes."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDrained:
    """What LetGo asked for is done: nothing of the run is on this node."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineShape:
    """What there is to know of a pipeline before it has run."""

    stages: int
    """How many the user asked for."""
    layer_bytes: tuple[int, ...]
    """Of each layer's parameters and buffers."""
    rank_bytes: int | None = None
    """The most of those that a rank may hold, if there is a limit."""
    sharded: bool = False
    """Whether optimizer state is in shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReady:
    """A rank has reached its training loop and waits to be seated (or repeats that it had)."""

    member: int
    node: str
    address: Address
    micro_batches: int
    steps: int | None
    """Length of its loop; None when only the end of a stream tells."""
    probe: str
    """Digest of a fixed computation: equal digests promise equal bits."""
    probe_fields: str
    """What the digest depends on, in words, for the error message."""
    pipeline: PipelineShape | None = None
    """Of a model that is cut into stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReported:
    report: SeatReport


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksProbed:
    """What a rank has found when it connected to the other members of a generation, as ProbeLinks asks."""

    member: int
    generation: int
    unreachable: tuple[int, ...]
    """Members that have not answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGone:
    """This incarnation is dead, or has been declared dead and is being killed."""

    member: int
    why: str
    silent_s: float = 0.0
    """Seconds between its last sign of life and this verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPending:
    """The cluster has no place for this rank, which was to be started: another place is looked for."""

    member: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCrashed:
    """An error of the machine (a device or its driver) was raised: this process ends, and is replaced."""

    member: int
    step: int
    traceback: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailed:
    """The user's code raised: not a fault, and never retried."""

    member: int
    step: int
    traceback: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReturned:
    """The user's function has returned here, with the state of this digest, or with this part of it.

    objects: of each object in the state its name and digest, to say what differs. verified: the newest step at whose
    start all ranks are known to have held the same state; -1 for none.
    """

    member: int
    step: int
    digest: str
    part: StatePart | None = None
    objects: tuple[tuple[str, str], ...] = ()
    verified: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCreated:
    """The key of this generation has been created by this controller."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTaken:
    """The key of this generation exists already: another controller rules."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryTaken:
    """What the live keepers hold, verified; asked for with TakeInventory."""

    asked: int
    inventories: tuple[Inventory, ...]
    addresses: tuple[tuple[str, Address], ...]
    """By node, where each of these keepers serves what it holds."""
    absent: tuple[str, ...]
    """Nodes whose keepers have not answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesDecoded:
    """The keepers have done what DecodeImages asked for, or could not."""

    asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSeen:
    """The complete checkpoints on storage, asked for with LookAtStorage; or why they can't be listed."""

    asked: int
    checkpoints: tuple[CheckpointFound, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What a restarted controller found written down; sent once, before anything else."""

    plans: tuple[Plan, ...]
    """All generations on record, ascending."""
    spawned: tuple[tuple[int, str], ...]
    """(member, node) of every rank ever started in this attempt."""
    gone: tuple[int, ...] = ()
    """Those of them that are on record as gone: to be killed, should they be seen again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""


Event = (
    NodeSeen
    | NoNodeFits
    | NodeGone
    | NodeLeaving
    | RankLeaving
    | SnapshotProtected
    | NodeDrained
    | RankReady
    | RankReported
    | LinksProbed
    | RankGone
    | RankPending
    | RankCrashed
    | RankFailed
    | RankReturned
    | GenerationCreated
    | GenerationTaken
    | InventoryTaken
    | ImagesDecoded
    | StorageSeen
    | Resumed
    | StopAsked
    | Tick
)
