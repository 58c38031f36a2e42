"""The plan of a generation: who takes part, where, and which micro-batches each rank owns.

A plan is a value. It is written once, under its generation's number, and never changed; whatever
happens next gets a new number. Every message and every key carries that number.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

Kind = Literal["initial", "planned", "unplanned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a rank's store listens, for the members of a generation to find each other."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A member of a generation. Its position in the plan is its rank."""

    member: int
    """Number of this incarnation of a rank, never used twice in an attempt."""
    node: str
    address: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who does what in one generation.

    Invariants: every leaf 0..micro_batches-1 is owned by exactly one place; every place owns at
    least one; joiners are members; only an initial or planned generation has joiners; an unplanned
    one has only members of its base.
    """

    generation: int
    base: int
    """The generation it was derived from; 0 when there is none."""
    kind: Kind
    places: tuple[Place, ...]
    leaves: tuple[tuple[int, ...], ...]
    """For each rank the micro-batches it owns, ascending."""
    micro_batches: int
    joiners: tuple[int, ...]
    """Members that hold no state yet and receive it from the others before they count."""
    reason: str

    def __post_init__(self) -> None:
        owned = sorted(index for leaves in self.leaves for index in leaves)
        assert owned == list(range(self.micro_batches)), f"leaves not dealt exactly once: {self}"
        assert len(self.leaves) == len(self.places) and all(self.leaves), self
        assert len(set(self.members)) == len(self.places), self
        assert set(self.joiners) < set(self.members), self
        assert not (self.kind == "unplanned" and self.joiners), self

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(place.member for place in self.places)

    @property
    def size(self) -> int:
        return len(self.places)

    @property
    def store(self) -> Address:
        """The store over which this generation forms: that of its first rank."""
        return self.places[0].address

    def rank_of(self, member: int) -> int:
        return self.members.index(member)

    def leaves_of(self, member: int) -> tuple[int, ...]:
        return self.leaves[self.rank_of(member)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        raw = json.loads(text)
        places = tuple(
            Place(member=place["member"], node=place["node"], address=Address(**place["address"]))
            for place in raw.pop("places")
        )
        leaves = tuple(tuple(leaves) for leaves in raw.pop("leaves"))
        return cls(places=places, leaves=leaves, joiners=tuple(raw.pop("joiners")), **raw)
