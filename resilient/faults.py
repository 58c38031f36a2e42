"""What can be done to a run, and which of it a seed chooses. Nothing is done here: see `resilient.chaos`.

The same seed makes the same choices from the same things to choose from. Whatever is chosen says why.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "stop", "cut", "all", "node", "keeper", "controller", "corrupt"]

KINDS: Mapping[Kind, str] = {
    "kill": "SIGKILL to one rank",
    "stop": "SIGSTOP to one rank, and SIGCONT a few seconds later",
    "cut": "the connections of one rank with all others broken, though everybody lives",
    "all": "SIGKILL to all ranks at once",
    "node": "SIGKILL to a raylet with all its processes, and the node's memory removed",
    "keeper": "SIGKILL to a node's keeper",
    "controller": "SIGKILL to the controller, which Ray restarts",
    "corrupt": "one bit flipped in a snapshot that a keeper has sealed",
}
SHORTEST_STOP_S, LONGEST_STOP_S = 0.3, 8.0
"""Some are over before anybody would notice, some last until the process is declared dead."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Seat:
    rank: int
    member: int
    node: str

    def __str__(self) -> str:
        return f"rank {self.rank} (member {self.member}, node {self.node[:8]})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What there is of a run to break, at one moment. All in a fixed order.

    nodes: those that may be killed. slots: snapshots that a keeper has sealed, as (node, name of the file).
    """

    seats: tuple[Seat, ...] = ()
    keepers: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    slots: tuple[tuple[str, str], ...] = ()
    controller: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One thing to do, and to what.

    stop_s: how long a rank is stopped. at: which byte of the slot's image, as a share of it. bit: which of its bits.
    """

    kind: Kind
    why: str
    seats: tuple[Seat, ...] = ()
    node: str = ""
    slot: str = ""
    stop_s: float = 0.0
    at: float = 0.0
    bit: int = 0

    @property
    def target(self) -> str:
        match self.kind:
            case "kill" | "stop" | "cut" | "all":
                return ", ".join(str(seat) for seat in self.seats)
            case "node":
                return f"node {self.node[:8]}"
            case "keeper":
                return f"the keeper of node {self.node[:8]}"
            case "controller":
                return "the controller"
            case "corrupt":
                return f"{self.slot} on node {self.node[:8]}"


def kinds_from(text: str) -> tuple[Kind, ...]:
    """Of "kill,node". Raises ValueError for what is not one of KINDS."""
    wanted = [name.strip() for name in text.split(",")]
    unknown = [name for name in wanted if name not in KINDS]
    if unknown:
        raise ValueError(f"kind {unknown[0]!r}: is one of {', '.join(KINDS)}, or several of them with commas between")
    return tuple(kind for kind in KINDS if kind in wanted)


def possible(kind: Kind, seen: Seen) -> bool:
    """Whether there is anything to do this to."""
    match kind:
        case "kill" | "stop" | "all":
            return bool(seen.seats)
        case "cut":
            return len(seen.seats) > 1
        case "node":
            return bool(seen.nodes)
        case "keeper":
            return bool(seen.keepers)
        case "controller":
            return seen.controller
        case "corrupt":
            return bool(seen.slots)


def choose(
    seen: Seen, kinds: Iterable[Kind], source: random.Random, weights: Mapping[Kind, float] | None = None
) -> Act | None:
    """One of these kinds, by weight, and then what to do it to; None if there is nothing for any of them."""
    wanted = [kind for kind in KINDS if kind in set(kinds)]
    able = [kind for kind in wanted if possible(kind, seen)]
    if not able:
        return None
    (kind,) = source.choices(able, [1.0 if weights is None else weights[kind] for kind in able])
    nothing_for = [name for name in wanted if name not in able]
    why = f"drawn from {', '.join(able)}" if len(wanted) > 1 else f"only {kind} was asked for"
    if nothing_for:
        why += f" (nothing to do now for {', '.join(nothing_for)})"
    return _aimed(kind, seen, source, why)


def _aimed(kind: Kind, seen: Seen, source: random.Random, why: str) -> Act:
    match kind:
        case "kill":
            return Act(kind=kind, seats=(source.choice(seen.seats),), why=f"{why}; {_one_of(seen.seats, 'rank')}")
        case "stop":
            seat, stop_s = source.choice(seen.seats), source.uniform(SHORTEST_STOP_S, LONGEST_STOP_S)
            return Act(kind=kind, seats=(seat,), stop_s=stop_s, why=f"{why}; {_one_of(seen.seats, 'rank')}")
        case "cut":
            seat = source.choice(seen.seats)
            others = tuple(other for other in seen.seats if other != seat)
            return Act(kind=kind, seats=(seat, *others), why=f"{why}; {_one_of(seen.seats, 'rank')}")
        case "all":
            return Act(kind=kind, seats=seen.seats, why=f"{why}; all {len(seen.seats)} there are")
        case "node":
            return Act(kind=kind, node=source.choice(seen.nodes), why=f"{why}; {_one_of(seen.nodes, 'node')}")
        case "keeper":
            return Act(kind=kind, node=source.choice(seen.keepers), why=f"{why}; {_one_of(seen.keepers, 'keeper')}")
        case "controller":
            return Act(kind=kind, why=why)
        case "corrupt":
            node, slot = source.choice(seen.slots)
            at, bit = source.random(), source.randrange(8)
            why = f"{why}; {_one_of(seen.slots, 'sealed slot')}"
            return Act(kind=kind, node=node, slot=slot, at=at, bit=bit, why=why)


def _one_of(found: Sequence[object], what: str) -> str:
    return f"one of {len(found)} {what}s" if len(found) > 1 else f"the only {what}"
