"""How many ranks fit on each node now, beside what other jobs use there; and who waits for a place in vain. Pure.

A node's free resources do not say whose the others are: a rank that Ray has placed and that is still starting looks
like another job's. So one that does not begin where nothing is free is withdrawn after a while, and the node is given
longer the next time: its processes may only be slow to start.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LONGEST_TIMES = 16
"""How often the first patience the longest is."""


@dataclass(slots=True, kw_only=True)
class Occupancy:
    patience_s: float
    """How long a rank may take to begin on a node where nothing is free."""
    _starting: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Ranks that have been ordered and have not begun: where, and since when."""
    _begun: dict[str, set[int]] = field(default_factory=dict)
    """By node."""
    _longer: dict[str, float] = field(default_factory=dict)
    """Nodes where ranks were withdrawn: how long the next may take."""

    def ordered(self, member: int, node: str, now: float) -> None:
        if member not in self._begun.get(node, ()):
            self._starting.setdefault(member, (node, now))

    def shown(self, node: str, members: set[int]) -> None:
        """Those that its keeper shows alive, and no others: of some another keeper may have known that has died."""
        for member in members:
            if self._starting.pop(member, None) is not None:
                self._longer.pop(node, None)
        self._begun[node] = members

    def ended(self, member: int, node: str) -> None:
        self._starting.pop(member, None)
        self._begun.get(node, set()).discard(member)

    def node_gone(self, node: str) -> None:
        self._begun.pop(node, None)
        self._longer.pop(node, None)
        self._starting = {member: at for member, at in self._starting.items() if at[0] != node}

    def room(self, node: str, total: int, free: int) -> int:
        """How many of ours the node can hold. total: if nobody else used it; free: how many more would fit now."""
        starting = sum(1 for where, _ in self._starting.values() if where == node)
        return min(total, len(self._begun.get(node, ())) + max(free, starting))

    def withdrawn(self, free: dict[str, int], now: float) -> tuple[tuple[int, str], ...]:
        """Ranks that have waited long enough while another node has a place, with their nodes, ascending; they count as
        ended."""
        found = tuple(
            (member, node)
            for member, (node, since) in sorted(self._starting.items())
            if free.get(node, 1) == 0 and any(free.values()) and now - since > self._patience_on(node)
        )
        for member, node in found:
            self._longer[node] = min(2 * self._patience_on(node), LONGEST_TIMES * self.patience_s)
            self.ended(member, node)
        return found

    def _patience_on(self, node: str) -> float:
        return self._longer.get(node, self.patience_s)
