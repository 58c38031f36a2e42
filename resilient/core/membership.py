"""Who is there: nodes and ranks as the controller knows them. Facts only; decisions are elsewhere.

Whoever changes a member says so with `changed`, and a node's capacity is set with `node_seen`: what is counted
is kept, so that asking costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import heappop, heappush

from .events import RankReady
from .plan import Plan
from .standing import Fact, Member, Tally, standing

MOST_GONE = 500
"""Of so many that are gone it is known where they were: whoever counts what memory holds has them killed first."""
MOST_STALE = 100


@dataclass(slots=True, kw_only=True)
class Membership:
    nodes: dict[str, int] = field(default_factory=dict)
    """Nodes that are alive, with the number of ranks that fit on each."""
    members: dict[int, Member] = field(default_factory=dict)
    leaving: dict[str, float] = field(default_factory=dict)
    """Nodes that were asked to leave, and until when each lives, as far as is known: no rank is placed there."""
    avoided: set[str] = field(default_factory=set)
    """Nodes where a rank is placed only if there is no other."""
    barred: set[str] = field(default_factory=set)
    """Those of them where none is placed for now."""
    everybody: Tally = field(default_factory=Tally, compare=False)
    _tallies: dict[int, tuple[Plan, Tally]] = field(default_factory=dict, compare=False)
    """Of the plans that are kept, by generation."""
    _standing: dict[int, tuple[Fact, ...]] = field(default_factory=dict, compare=False)
    """As it is counted."""
    _living: dict[str, set[int]] = field(default_factory=dict, compare=False)
    """By node."""
    _room: list[tuple[int, str]] = field(default_factory=list, compare=False)
    """A heap of (-free room, node); what is not true any more is dropped when it comes up."""
    _forgotten: int = field(default=0, compare=False)
    """Members up to this number of which nothing is known are gone."""
    _first_ready: Member | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for node in self.nodes:
            self._room_changed(node)
        for member in self.members.values():
            self.changed(member)

    # Facts

    def node_seen(self, node: str, capacity: int) -> None:
        if self.nodes.get(node) != capacity:
            self.nodes[node] = capacity
            self._room_changed(node)

    def node_gone(self, node: str) -> None:
        self.nodes.pop(node, None)

    def node_leaves(self, node: str, by: float) -> None:
        self.leaving[node] = by
        for member in self.on_node(node):
            self.member_leaves(member, by)

    def member_leaves(self, member: Member, by: float) -> None:
        member.leaving, member.leave_by = True, min(by, member.leave_by)
        self.changed(member)

    def avoid(self, node: str) -> None:
        self.avoided.add(node)

    def new_member(self, number: int, node: str) -> Member:
        """Of one that is known already, what is known."""
        if self._is_forgotten(number):
            return Member(number=number, node=node, gone=True)
        if number not in self.members:
            self.members[number] = Member(number=number, node=node)
            self.changed(self.members[number])
            if node in self.leaving:
                self.member_leaves(self.members[number], self.leaving[node])
        return self.members[number]

    def changed(self, member: Member) -> None:
        """It is new, or what is known of it has changed."""
        number, before, now = member.number, self._standing.get(member.number, ()), standing(member)
        if member.ready is not None and self._first_ready is not None and number < self._first_ready.number:
            self._first_ready = member
        if now == before:
            return
        self._standing[number] = now
        for tally in (self.everybody, *(tally for plan, tally in self._tallies.values() if number in plan.ranks)):
            tally.remove(number, before)
            tally.add(number, now)
        if not before or member.gone:
            living = self._living.setdefault(member.node, set())
            (living.discard if member.gone else living.add)(number)
            if not living:
                del self._living[member.node]
            self._room_changed(member.node)

    def forget_gone(self, plans: Collection[Plan]) -> list[int]:
        """Those that have been gone for longest, if too many are, but for those in these plans: that they are gone is
        all that stays known of them."""
        gone = sorted(self.everybody.numbers("gone"))
        oldest = gone[: max(0, len(gone) - MOST_GONE)]
        found = [number for number in oldest if not any(number in plan.ranks for plan in plans)]
        for number in found:
            self.everybody.remove(number, self._standing.pop(number))
            del self.members[number]
        self._forgotten = max(found, default=self._forgotten)
        return found

    def keep(self, *plans: Plan | None) -> None:
        """The plans whose tallies are to be kept from now on, and no others."""
        self._tallies = {plan.generation: (plan, self._followed(plan)) for plan in plans if plan is not None}

    def _followed(self, plan: Plan) -> Tally:
        kept = self._tallies.get(plan.generation)
        if kept is not None and kept[0] is plan:
            return kept[1]
        # A death or a joiner leaves almost all where they were.
        former, counted = self._tallies[max(self._tallies)] if self._tallies else (None, Tally())
        before, tally = set(former.ranks) if former is not None else set[int](), counted.copy()
        for number in before - plan.ranks.keys():
            tally.remove(number, self._standing[number])
        for number in plan.ranks.keys() - before:
            tally.add(number, self._standing[number])
        return tally

    # Questions

    def tally(self, plan: Plan) -> Tally:
        """How the members of a plan stand: as it is kept, else counted now."""
        kept = self._tallies.get(plan.generation)
        if kept is not None and kept[0] is plan:
            return kept[1]
        counted = Tally()
        for number in plan.members:
            counted.add(number, standing(self.members.get(number)))
        return counted

    def alive(self) -> list[Member]:
        return [self.members[number] for number in sorted(self.members) if not self.members[number].gone]

    def count_staying(self) -> int:
        """Who lives, and was not asked to leave."""
        return len(self.members) - self.everybody.count("gone") - self.everybody.count("leaving")

    def leavers(self) -> list[Member]:
        """Who lives, and was asked to leave, oldest first."""
        return [self.members[number] for number in sorted(self.everybody.numbers("leaving"))]

    def is_alive(self, number: int) -> bool:
        return number in self.members and not self.members[number].gone

    def is_gone(self, number: int) -> bool:
        return self.members[number].gone if number in self.members else self._is_forgotten(number)

    def _is_forgotten(self, number: int) -> bool:
        return number <= self._forgotten and number not in self.members

    def first_ready(self) -> RankReady | None:
        """What the oldest living rank in its loop has said of that."""
        if self._first_ready is None or self._first_ready.gone:
            self._first_ready = next((member for member in self.alive() if member.ready is not None), None)
        return None if self._first_ready is None else self._first_ready.ready

    def ready_unseated(self, seated: Collection[int]) -> list[Member]:
        """Ranks that wait in their training loop without a seat, oldest first."""
        return [self.members[number] for number in sorted(self.everybody.numbers("ready")) if number not in seated]

    def count_ready_outside(self, plan: Plan) -> int:
        return self.everybody.count("ready") - self.tally(plan).count("ready")

    def strays(self, plan: Plan) -> list[Member]:
        """Living ranks that hold state and have no seat in the plan, oldest first; without those that are leaving."""
        seated = self.tally(plan)
        if self.everybody.count("holding") == seated.count("holding"):
            return []
        strays = self.everybody.numbers("holding") - seated.numbers("holding") - self.everybody.numbers("leaving")
        return [self.members[number] for number in sorted(strays)]

    def on_node(self, node: str) -> list[Member]:
        return [self.members[number] for number in sorted(self._living.get(node, ()))]

    def roomiest(self) -> str | None:
        """The node with most free room for a rank, by name among equals; None when all are full."""
        while self._room and -self._room[0][0] != self._free(self._room[0][1]):
            heappop(self._room)
        if self._room and self._room[0][0] < 0:
            return self._room[0][1]
        spare = (self.avoided - self.barred) & self.nodes.keys()
        room = {node: self.nodes[node] - len(self._living.get(node, ())) for node in spare}
        best = max(sorted(room.keys() - self.leaving.keys()), key=room.__getitem__, default=None)
        return best if best is not None and room[best] > 0 else None

    def _free(self, node: str) -> int | None:
        kept_free = node in self.leaving or node in self.avoided
        capacity = None if kept_free else self.nodes.get(node)
        return None if capacity is None else capacity - len(self._living.get(node, ()))

    def _room_changed(self, node: str) -> None:
        free = self._free(node)
        if free is not None:
            heappush(self._room, (-free, node))
        if len(self._room) > 2 * len(self.nodes) + MOST_STALE:
            self._room = sorted((-free, node) for node in self.nodes if (free := self._free(node)) is not None)
