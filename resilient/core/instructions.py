"""What the controller wants done. Each carries its reason; each outcome comes back as an event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from snapshot.core.election import Elected

from .plan import Place, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    """Start a rank on a node. It comes back as RankReady, or as RankGone."""

    member: int
    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Make sure that this incarnation never writes again."""

    member: int
    node: str
    reason: str
    released: bool = False
    """It was asked to leave, and nobody needs it any more: no fault. It lives, and comes back as GenerationTaken, if
    there is a newer generation by then: another controller has made that, and may have seated it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LetGo:
    """End the keeper of a node on which no rank is left, and remove what it holds, once what it is to make durable
    is. Comes back as NodeDrained, or as NodeGone."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateGeneration:
    """Create the generation's key, refusing to overwrite. Comes back as GenerationCreated or -Taken."""

    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class SendPlan:
    member: int
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLinks:
    """Have these members connect to each other, for a moment. Comes back as LinksProbed from each."""

    generation: int
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeInventory:
    """Ask all keepers what snapshots they hold, once these members have ended. Comes back as InventoryTaken."""

    asked: int
    ended: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeImages:
    """Have the keepers decode what of this snapshot is lost. Comes back as ImagesDecoded."""

    asked: int
    elected: Elected


@dataclass(frozen=True, slots=True, kw_only=True)
class LookAtStorage:
    """List the complete checkpoints on storage. Comes back as StorageSeen."""

    asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Say:
    """Something the user should read."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The run is over: stop every rank and keeper, and hand over the outcome."""

    outcome: Literal["finished", "failed", "stopped", "superseded"]
    reason: str
    digest: str = ""


Instruction = (
    Spawn
    | Kill
    | LetGo
    | CreateGeneration
    | SendPlan
    | ProbeLinks
    | TakeInventory
    | DecodeImages
    | LookAtStorage
    | Say
    | End
)
