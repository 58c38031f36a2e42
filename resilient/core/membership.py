"""Who is there: nodes and ranks as the controller knows them. Facts only; decisions are elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

from .events import RankReady
from .plan import Place
from .seat import SeatReport


@dataclass(slots=True, kw_only=True)
class Member:
    """One incarnation of a rank."""

    number: int
    node: str
    gone: bool = False
    ready: RankReady | None = None
    report: SeatReport | None = None
    digest: str | None = None
    """Set when the user's function has returned."""
    plan_sent_at: float = float("-inf")

    @property
    def place(self) -> Place:
        assert self.ready is not None, self
        return Place(member=self.number, node=self.node, address=self.ready.address)


@dataclass(slots=True, kw_only=True)
class Starts:
    """Ranks that died before they reached their loop, since the last one that did.

    Not counted are those whose node has died, and those that an earlier controller started.
    """

    mine: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)

    def started(self, member: int) -> None:
        self.mine.add(member)

    def reached_loop(self) -> None:
        self.failed.clear()

    def died(self, member: Member) -> None:
        if member.ready is None and member.number in self.mine:
            self.failed[member.number] = member.node

    def node_gone(self, node: str) -> None:
        self.failed = {member: on for member, on in self.failed.items() if on != node}


@dataclass(slots=True, kw_only=True)
class Membership:
    nodes: dict[str, int] = field(default_factory=dict)
    """Nodes that are alive, with the number of ranks that fit on each."""
    members: dict[int, Member] = field(default_factory=dict)

    def alive(self) -> list[Member]:
        return [self.members[number] for number in sorted(self.members) if not self.members[number].gone]

    def is_alive(self, number: int) -> bool:
        return number in self.members and not self.members[number].gone

    def ready_unseated(self, seated: tuple[int, ...]) -> list[Member]:
        """Ranks that wait in their training loop without a seat, oldest first."""
        return [
            member
            for member in self.alive()
            if member.ready is not None
            and member.number not in seated
            and (member.report is None or member.report.formed == 0)
        ]

    def on_node(self, node: str) -> list[Member]:
        return [member for member in self.alive() if member.node == node]

    def roomiest(self) -> str | None:
        """The node with most free room for a rank, by name among equals; None when all are full."""
        free = {node: capacity - len(self.on_node(node)) for node, capacity in self.nodes.items()}
        best = min(sorted(free), key=lambda node: -free[node], default=None)
        return best if best is not None and free[best] > 0 else None
