"""What happens to a run, one record for each thing that does: told from what goes into the core and comes out. Pure.

Facts may be repeated; a record is made once, when something is new.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .chronicle import Recovery
from .control import Control
from .events import (
    Event,
    GenerationCreated,
    NodeDrained,
    NodeGone,
    NodeLeaving,
    NodeSeen,
    RankLeaving,
    RankReady,
    Resumed,
)
from .instructions import Instruction, Kill, Say, Spawn

Kind = Literal[
    "run began",
    "controller restarted",
    "node seen",
    "node gone",
    "node leaving",
    "node drained",
    "rank started",
    "rank ready",
    "rank leaving",
    "rank left",
    "rank gone",
    "generation created",
    "generation formed",
    "recovery ended",
    "waiting for nodes",
    "nodes have come",
    "straggler",
    "checkpoint durable",
    "checkpoint failed",
    "run ended",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """generation: the newest one at that time. more: what else there is to say of this kind, as plain values."""

    kind: Kind
    reason: str = ""
    generation: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Story:
    _nodes: set[str] = field(default_factory=set)
    _leaving: set[str | int] = field(default_factory=set)
    _ready: set[int] = field(default_factory=set)
    _formed: int = 0
    _recoveries: int = 0
    _waiting: bool = False
    _stragglers: set[int] = field(default_factory=set)

    def after(self, event: Event, instructions: Sequence[Instruction], control: Control) -> list[Happening]:
        """What is new now that the core has taken in `event`."""
        return [
            Happening(
                kind=kind, reason=reason, generation=control.current.generation if control.current else 0, more=more
            )
            for kind, reason, more in (
                *self._told(event, control),
                *self._instructed(instructions, control),
                *self._changed(instructions, control),
            )
        ]

    def _told(self, event: Event, control: Control) -> Iterator[tuple[Kind, str, dict[str, Any]]]:
        match event:
            case Resumed(spawned=spawned):  # what the controller before has told of
                self._nodes.update(node for _, node in spawned)
                self._ready.update(member for member, _ in spawned)
                self._formed = control.formed.generation if control.formed else 0
            case NodeSeen(node=node, capacity=capacity) if node not in self._nodes:
                self._nodes.add(node)
                yield "node seen", f"it has room for {capacity}", {"node": node, "capacity": capacity}
            case NodeGone(node=node, why=why, silent_s=silent_s) if node in self._nodes:
                self._nodes.discard(node)
                yield "node gone", why, {"node": node, "silent_s": silent_s}
            case NodeLeaving(node=node, why=why) if node not in self._leaving:
                self._leaving.add(node)
                yield "node leaving", why, {"node": node}
            case NodeDrained(node=node):
                self._leaving.discard(node)
                yield "node drained", "nothing of the run is on it", {"node": node}
            case RankLeaving(member=member, why=why) if member not in self._leaving:
                self._leaving.add(member)
                yield "rank leaving", why, {"member": member, "rank": _rank(member, control)}
            case RankReady(member=member, node=node) if member not in self._ready:
                self._ready.add(member)
                yield "rank ready", "it has reached its training loop", {"member": member, "node": node}
            case GenerationCreated(generation=number) if (plan := control.current) and plan.generation == number:
                yield "generation created", plan.reason, {"ranks": plan.size, "joiners": list(plan.joiners)}

    def _instructed(
        self, instructions: Sequence[Instruction], control: Control
    ) -> Iterator[tuple[Kind, str, dict[str, Any]]]:
        for instruction in instructions:
            match instruction:
                case Spawn(member=member, node=node, reason=reason):
                    yield "rank started", reason, {"member": member, "node": node}
                case Kill(member=member, node=node, reason=reason, released=released):
                    self._ready.discard(member)
                    rank = _rank(member, control)
                    more = {"member": member, "node": node, "rank": rank}
                    yield "rank left" if released else "rank gone", reason, more

    def _changed(
        self, instructions: Sequence[Instruction], control: Control
    ) -> Iterator[tuple[Kind, str, dict[str, Any]]]:
        formed, chronicle = control.formed, control.chronicle
        if formed is not None and formed.generation > self._formed:
            self._formed = formed.generation
            yield "generation formed", formed.reason, {"generation": formed.generation, "ranks": formed.size}
        for recovery in chronicle.ended_after(self._recoveries):
            yield "recovery ended", recovery.reason, recovered(recovery)
        self._recoveries = chronicle.ended
        if control.waits != self._waiting:
            self._waiting = control.waits
            said = next((found.text for found in instructions if isinstance(found, Say)), "there are too few")
            yield ("waiting for nodes", said, {}) if self._waiting else ("nodes have come", "there are enough", {})
        for member in sorted(control.speeds.stragglers - self._stragglers):
            node = control.membership.members[member].node
            more = {"member": member, "rank": _rank(member, control), "node": node}
            yield "straggler", "it is much slower than the others", more
        self._stragglers = set(control.speeds.stragglers)


def recovered(recovery: Recovery) -> dict[str, Any]:
    """All there is to say of one, phases in seconds."""
    found = {**asdict(recovery), "recovery": recovery.kind, "total_s": recovery.total_s}
    return {name: value for name, value in found.items() if name not in ("kind", "reason", "generation", "began_at")}


def _rank(member: int, control: Control) -> int | None:
    return None if control.current is None else control.current.ranks.get(member)
