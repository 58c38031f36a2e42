"""What the controller wants done. Each carries its reason; each outcome comes back as an event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .plan import Plan


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateGeneration:
    """Create the generation's key, refusing to overwrite. Comes back as GenerationCreated or -Taken."""

    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class SendPlan:
    member: int
    plan: Plan


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


Instruction = Spawn | Kill | CreateGeneration | SendPlan | Say | End
