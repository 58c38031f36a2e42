"""Who leaves in a planned change, and who comes in the same step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .membership import Membership
from .plan import Plan
from .standing import Member


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """All in order of rank. stay: whoever keeps a seat; some of them may have been asked to leave."""

    stay: tuple[Member, ...]
    leave: tuple[Member, ...]
    join: tuple[Member, ...]
    waits: bool
    """More could join soon: it is worth waiting for them, if there is time."""
    short: str
    """Why nothing can change, if nothing can."""

    @property
    def reason(self) -> str:
        left, joined = len(self.leave), len(self.join)
        said = [f"{left} left (node {_nodes(self.leave)})"] if left else []
        said += [f"{joined} joined (node {_nodes(self.join)})"] if joined else []
        return ", ".join(said)


def choose(membership: Membership, current: Plan, *, least: int, most: int, wanted: int) -> Choice:
    """As many leave as may.

    least, most: how many ranks there must and may be. wanted: how many processes, with spares.
    At least `least` are left, and one that holds the state: where all are to leave, the last one hands it over to
    those that come, and for that time there may be one more than `most`.
    """
    leavers = [member for number in current.members if (member := membership.members[number]).leaving]
    staying = current.size - len(leavers)
    most = min(most, current.seats)
    room = most - staying if staying else min(most, current.seats - 1)
    joiners = membership.ready_unseated(current.ranks)[: max(0, room)]
    kept = max(least - staying - len(joiners), 0 if staying else 1)
    leavers.sort(key=lambda member: (-member.leave_by, member.node, member.number))
    leave = {member.number for member in leavers[kept:]}
    coming = bool(membership.everybody.values("starting"))
    coming = coming or (membership.count_staying() < wanted and membership.roomiest() is not None)
    short = ""
    if not leave and not joiners:
        left = f"{staying} of at least {least} workers would be left" if staying else "no worker would be left"
        short = f"not yet: {left}" + ("" if coming else ", and there is no room elsewhere: add nodes")
    return Choice(
        stay=tuple(membership.members[number] for number in current.members if number not in leave),
        leave=tuple(membership.members[number] for number in current.members if number in leave),
        join=tuple(joiners),
        waits=coming and len(joiners) < room,
        short=short,
    )


def _nodes(members: Iterable[Member]) -> str:
    return ", ".join(sorted({member.node[:8] for member in members}))
