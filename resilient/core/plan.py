"""The plan of a generation: who takes part, where, and which micro-batches each rank owns.

A plan is a value. It is written once, under its generation's number, and never changed; whatever
happens next gets a new number. Every message and every key carries that number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, Literal

from snapshot.core.branches import Branch, Lineage
from snapshot.core.inventory import SnapshotKey

Kind = Literal["initial", "planned", "unplanned", "restored"]


def first_branch() -> Lineage:
    return Lineage(branches=(Branch(number=0),))


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
class Share:
    """One rank's part of a snapshot, and who serves it."""

    rank: int
    node: str
    """Where it was captured."""
    keeper: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """The snapshot that a generation begins from: the state at the start of `step`."""

    key: SnapshotKey
    shares: tuple[Share, ...] = ()
    """Together the whole state; none if it is read from storage."""
    decoded: bool = False
    """Whether parity had to make up for what was lost."""
    folder: str = ""
    """Of the checkpoint on storage that it is read from; empty if it is in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who does what in one generation.

    Invariants: every leaf 0..micro_batches-1 is owned by exactly one place; every place owns at
    least one; joiners are members; only an initial or planned generation has joiners; an unplanned
    one has only members of its base; all members of a restored one begin from its snapshot, whatever
    they held before.
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
    branches: tuple[Branch, ...] = (Branch(number=0),)
    """The run's lines of steps so far; this generation goes on with the newest."""
    restore: Restore | None = None
    members: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """By rank."""
    ranks: dict[int, int] = field(init=False, repr=False, compare=False)
    """By member."""
    longest: int = field(init=False, repr=False, compare=False)
    """The most micro-batches that a rank owns."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(place.member for place in self.places))
        object.__setattr__(self, "ranks", {member: rank for rank, member in enumerate(self.members)})
        object.__setattr__(self, "longest", max(map(len, self.leaves), default=0))
        owned = sorted(chain.from_iterable(self.leaves))
        assert owned == list(range(self.micro_batches)), f"leaves not dealt exactly once: {self}"
        assert len(self.leaves) == len(self.places) and all(self.leaves), self
        assert len(self.ranks) == len(self.places), self
        assert len(set(self.joiners)) < self.size and self.ranks.keys() >= set(self.joiners), self
        assert not (self.kind in ("unplanned", "restored") and self.joiners), self
        assert (self.kind == "restored") == (self.restore is not None), self

    @property
    def branch(self) -> int:
        return self.branches[-1].number

    @property
    def skipped(self) -> tuple[int, ...]:
        """Positions in the data that are left out, ascending."""
        return Lineage(branches=self.branches).skipped

    @property
    def size(self) -> int:
        return len(self.places)

    @property
    def store(self) -> Address:
        """The store over which this generation forms: that of its first rank."""
        return self.places[0].address

    def rank_of(self, member: int) -> int:
        return self.ranks[member]

    def rank_in_words(self, member: int) -> str:
        return str(self.ranks[member]) if member in self.ranks else f"(member {member}, not yet seated)"

    def leaves_of(self, member: int) -> tuple[int, ...]:
        return self.leaves[self.rank_of(member)]

    def owners(self) -> list[int]:
        """The rank that owns each micro-batch."""
        found = [0] * self.micro_batches
        for rank, leaves in enumerate(self.leaves):
            for leaf in leaves:
                found[leaf] = rank
        return found

    def to_json(self) -> str:
        return json.dumps(_given(self), sort_keys=True, default=_given)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        raw = json.loads(text)
        places = tuple(
            Place(member=place["member"], node=place["node"], address=Address(**place["address"]))
            for place in raw.pop("places")
        )
        leaves = tuple(tuple(leaves) for leaves in raw.pop("leaves"))
        joiners = tuple(raw.pop("joiners"))
        restore = _restore_from(raw.pop("restore"))
        branches = tuple(Branch(**{**branch, "skipped": tuple(branch["skipped"])}) for branch in raw.pop("branches"))
        return cls(places=places, leaves=leaves, joiners=joiners, restore=restore, branches=branches, **raw)


def _given(value: Any) -> dict[str, Any]:
    """What a value was made from, one level deep. `asdict` copies every string on its way, and takes five times as
    long."""
    return {each.name: getattr(value, each.name) for each in fields(value) if each.init}


def _restore_from(raw: dict[str, Any] | None) -> Restore | None:
    if raw is None:
        return None
    shares = tuple(
        Share(rank=share["rank"], node=share["node"], keeper=Address(**share["keeper"])) for share in raw.pop("shares")
    )
    return Restore(key=SnapshotKey(**raw["key"]), shares=shares, decoded=raw["decoded"], folder=raw["folder"])
