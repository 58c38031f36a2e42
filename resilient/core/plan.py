"""The plan of a generation: who takes part, where, and which micro-batches each rank owns.

A plan is a value. It is written once, under its generation's number, and never changed; whatever
happens next gets a new number. Every message and every key carries that number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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
    post: int = 0
    """Where it takes in what other stages of a pipeline send it; 0 if there are none."""


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
class Stage:
    """Consecutive layers first..stop-1 of a pipeline, and the ranks that hold them, ascending."""

    first: int
    stop: int
    ranks: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        """How many layers, and how many ranks."""
        return self.stop - self.first, len(self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who does what in one generation.

    Invariants: in every stage each leaf 0..micro_batches-1 is owned by exactly one place; every place owns at
    least one, and is in one stage; the stages' layers follow on each other from 0; joiners are members; only an initial
    or planned generation has joiners; an unplanned one has only members of its base; all members of a restored one
    begin from its snapshot, whatever they held before.
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
    stages: tuple[Stage, ...] = ()
    """Of a pipeline, in the order of its layers; none where every rank holds the whole model."""
    since: int = 0
    """The generation with which the state was last taken from a snapshot; 0 if it never was. What ranks have sent each
    other before then counts no more."""
    sharded: bool = False
    """Whether each rank has optimizer state that no other has."""
    emptied: tuple[int, ...] = ()
    """Members that own no chunk of it, since they are to leave next."""
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
        for ranks in (stage.ranks for stage in self.stages) if self.stages else (range(self.size),):
            owned = sorted(chain.from_iterable(self.leaves[rank] for rank in ranks))
            assert owned == list(range(self.micro_batches)), f"leaves not dealt exactly once: {self}"
        self._check_stages()
        assert len(self.leaves) == len(self.places) and all(self.leaves), self
        assert len(self.ranks) == len(self.places), self
        assert len(set(self.joiners)) < self.size and self.ranks.keys() >= set(self.joiners), self
        assert not (self.kind in ("unplanned", "restored") and self.joiners), self
        assert (self.kind == "restored") == (self.restore is not None), self

    def _check_stages(self) -> None:
        reached = 0
        for stage in self.stages:
            assert stage.first == reached < stage.stop and stage.ranks, f"layers left out or repeated: {self}"
            reached = stage.stop
        seated = sorted(chain.from_iterable(stage.ranks for stage in self.stages))
        assert not self.stages or seated == list(range(self.size)), f"ranks not in exactly one stage: {self}"

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
    def seats(self) -> int:
        """The most ranks that can have a micro-batch."""
        return self.micro_batches * max(1, len(self.stages))

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

    def team(self, rank: int) -> tuple[int, ...]:
        """The ranks of its stage, ascending: they hold the same layers, and share out the micro-batches."""
        stage = self.stage_of(rank)
        return tuple(range(self.size)) if stage is None else stage.ranks

    def stage_number(self, rank: int) -> int:
        """Of this rank's stage; 0 where there is only one."""
        return next((number for number, stage in enumerate(self.stages) if rank in stage.ranks), 0)

    def stage_of(self, rank: int) -> Stage | None:
        return next((stage for stage in self.stages if rank in stage.ranks), None)

    def owners(self, ranks: Iterable[int]) -> list[int]:
        """The rank of these (a stage's) that owns each micro-batch."""
        found = [0] * self.micro_batches
        for rank in ranks:
            for leaf in self.leaves[rank]:
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
        joiners, emptied = tuple(raw.pop("joiners")), tuple(raw.pop("emptied", ()))
        restore = _restore_from(raw.pop("restore"))
        branches = tuple(Branch(**{**branch, "skipped": tuple(branch["skipped"])}) for branch in raw.pop("branches"))
        stages = tuple(Stage(**{**stage, "ranks": tuple(stage["ranks"])}) for stage in raw.pop("stages", ()))
        return cls(
            places=places,
            leaves=leaves,
            joiners=joiners,
            restore=restore,
            branches=branches,
            stages=stages,
            emptied=emptied,
            **raw,
        )


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
