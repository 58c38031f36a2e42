"""Links between living ranks that carry nothing: a firewall or a switch drops packets, and nobody hears of it.

All wait for each other then, and every keeper is well: no silence tells who is at fault.

standstill    all living members of a generation wait, and nothing comes: it is formed again, over new connections
probe         in a standstill, or where the generation after it does not form, its members connect to each other
verdict       a pair of which both say that they could not, in two generations: the rank with the most such pairs is
              replaced. A joiner that could not in one is replaced at once, since it holds nothing yet. Their node
              gets no other rank for a while, longer each time: nobody says when a link is mended, and to try it costs
              a standstill
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .events import LinksProbed
from .instructions import ProbeLinks
from .plan import Plan

if TYPE_CHECKING:
    from .control import Control

RECUR_S = 600.0
"""For so long a pair that could not connect is remembered."""
BAR_S, LONGEST_BAR_S = 60.0, 3600.0

Pair = tuple[int, int]


@dataclass(slots=True, kw_only=True)
class SilentLinks:
    control: Control = field(repr=False, compare=False)
    barred: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Nodes that get no rank: until when, and for how long."""
    _said: dict[Pair, int] = field(default_factory=dict)
    """Of a member, and another that it could not connect to, in which generation it has said so last."""
    _found: dict[Pair, tuple[int, float]] = field(default_factory=dict)
    """Pairs that could not connect: in which generation, and when that was told."""
    _again: set[Pair] = field(default_factory=set)
    """Those of them that could not in two, or in one if a joiner is among them."""
    _trouble_at: float | None = None
    """When a generation last stood still or broke, if no step was committed since."""
    _asked: tuple[int, float] = (0, 0.0)

    def probed(self, event: LinksProbed) -> None:
        """Only where both say so: who is stopped answers nobody, and says nothing."""
        now = self.control.now
        self._said = {pair: told for pair, told in self._said.items() if told >= event.generation - 1}
        self._found = {pair: told for pair, told in self._found.items() if now - told[1] <= RECUR_S}
        for other in event.unreachable:
            self._said[event.member, other] = event.generation
            if self._said.get((other, event.member)) != event.generation:
                continue
            pair = (min(event.member, other), max(event.member, other))
            generation, _ = self._found.get(pair, (event.generation, now))
            if event.generation > generation or not self._seated(pair):
                self._again.add(pair)
            if event.generation >= generation:
                self._found[pair] = event.generation, now

    def look(self, *, still: bool, broken: bool) -> None:
        """Whether the current generation stands still, or a link of it broke."""
        troubled = still or broken
        control, plan = self.control, self.control.current
        self._unbar()
        if plan is None:
            return
        again = self._trouble_at is not None
        if troubled:
            self._trouble_at = control.now
        elif self._trouble_at is not None and control.chronicle.committed_at > self._trouble_at:
            self._trouble_at = None
            self._again.clear()
        forms_late = control.for_s("forming", control.formed is not plan) >= control.limits.detection_s
        if still or (again and (troubled or forms_late)):
            self._ask(plan)
        self._judge(plan)

    def _ask(self, plan: Plan) -> None:
        generation, at = self._asked
        if plan.generation == generation and self.control.now - at < 2 * self.control.limits.detection_s:
            return
        self._asked = plan.generation, self.control.now
        self.control.instruct((ProbeLinks(generation=plan.generation, places=plan.places),))

    def _judge(self, plan: Plan) -> None:
        """Replace ranks until no two are left that can't reach each other."""
        membership = self.control.membership
        while True:
            self._again = {pair for pair in self._again if all(map(membership.is_alive, pair))}
            pairs = [pair for pair in sorted(self._again) if self._trouble_at is not None or not self._seated(pair)]
            if not pairs or self.control.ended:
                return
            counts = Counter(member for pair in pairs for member in pair)
            worst = max(counts, key=lambda member: (counts[member], *self._dispensable(plan, member)))
            nodes = {membership.members[other].node[:8] for pair in pairs if worst in pair for other in pair}
            nodes -= {membership.members[worst].node[:8]}
            self._replace(worst, f"nothing passes between it and node {', '.join(sorted(nodes))}")

    def _seated(self, pair: Pair) -> bool:
        formed = self.control.formed
        return formed is None or formed.ranks.keys() >= set(pair)

    def _replace(self, member: int, why: str) -> None:
        node = self.control.membership.members[member].node
        self.control.deaths.replace((member,), why)
        _, lasted_s = self.barred.get(node, (0.0, BAR_S / 2))
        bar_s = min(2 * lasted_s, LONGEST_BAR_S)
        self.barred[node] = self.control.now + bar_s, bar_s
        self.control.membership.barred.add(node)

    def _unbar(self) -> None:
        """How long it lasted is remembered for as long as the longest takes."""
        over = [(node, until) for node, (until, _) in self.barred.items() if until <= self.control.now]
        for node, until in over:
            self.control.membership.barred.discard(node)
            if self.control.now - until > LONGEST_BAR_S:
                del self.barred[node]

    def _dispensable(self, plan: Plan, member: int) -> tuple[bool, bool, int]:
        """Whose loss costs least: a joiner, then one whose layers others have too, then the highest rank."""
        rank = plan.ranks.get(member, -1)
        return not self._seated((member, member)), rank < 0 or len(plan.team(rank)) > 1, rank
