"""Links between two living nodes that drop everything, for a while or for good: nobody hears of it.

Drawn apart from all other faults, so that the stories of seeds without them stay what they are.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from resilient.core.events import LinksProbed
from resilient.core.instructions import ProbeLinks
from resilient.core.plan import Plan

if TYPE_CHECKING:
    from .rank import Rank
    from .shell import Shell
    from .world import World

MORE_TIME_S = 240.0
"""To find two nodes that can't reach each other takes two standstills, and they may be met again."""


class SilentLinks:
    def __init__(self, world: World, *, wanted: bool) -> None:
        self.world, self.wanted = world, wanted
        self.rng = random.Random(f"silent {world.seed}")
        self._until: dict[frozenset[str], float] = {}
        self._waits: dict[int, tuple[object, float]] = {}
        """By rank that waits, how it stands, and since when."""

    @property
    def more_time_s(self) -> float:
        return MORE_TIME_S if self.wanted else 0.0

    def begin(self) -> None:
        if self.wanted:
            for _ in range(self.rng.choice([1, 1, 2])):
                self.world.at(self.rng.uniform(0.5, self.world.setting.fault_phase_s), self._fall_silent)

    def _fall_silent(self) -> None:
        names = sorted(name for name, node in self.world.nodes.items() if node.alive)
        if len(names) < 2:
            return
        pair = frozenset(self.rng.sample(names, 2))
        lasts_s = self.rng.choice([self.rng.uniform(1.0, 30.0), float("inf")])
        self._until[pair] = self.world.now + lasts_s
        self.world.disturbed = True
        self.world.seen["link silent"] += 1
        self.world.tell(f"nothing passes between {' and '.join(sorted(pair))} for {lasts_s:.0f} s")

    def between(self, one: str, other: str) -> bool:
        return self.wanted and self._until.get(frozenset((one, other)), 0.0) > self.world.now

    def within(self, plan: Plan) -> bool:
        """Whether some members of a generation can't reach each other."""
        if not self.wanted:
            return False
        nodes = sorted({place.node for place in plan.places})
        return any(self.between(one, other) for one in nodes for other in nodes if one < other)

    def cut_for_good(self) -> set[str]:
        """Nodes that others will never reach."""
        return {name for pair, until in self._until.items() if until == float("inf") for name in pair}

    def stalls(self, rank: Rank) -> bool:
        """What the rank itself notices: it waits, and nothing has come for long."""
        plan = rank.seat.plan
        if not self.wanted or plan is None or not (rank.has_empty_hands or rank.seat.finished):
            self._waits.pop(rank.member, None)
            return False
        stands_at = plan.generation, rank.seat.forming, rank.seat.step, rank.seat.complete
        known, since = self._waits.setdefault(rank.member, (stands_at, self.world.now))
        if known != stands_at:
            self._waits[rank.member] = stands_at, self.world.now
            return False
        return self.world.now - since > self.world.setting.limits.stall_s

    def probe(self, shell: Shell, asked: ProbeLinks) -> None:
        world = self.world
        world.seen["links probed"] += 1
        for place in asked.places:
            rank = world.ranks.get(place.member)
            if rank is not None:
                world.message(lambda rank=rank: self._answer(rank, asked))

    def _answer(self, rank: Rank, asked: ProbeLinks) -> None:
        def tell() -> None:
            found = tuple(place.member for place in asked.places if self._is_unreachable(rank, place.member))
            event = LinksProbed(member=rank.member, generation=asked.generation, unreachable=found)
            self.world.to_controllers(rank.node, lambda shell: shell.take(event))

        rank.later(self.rng.uniform(0.01, self.world.setting.limits.reach_s), tell)

    def _is_unreachable(self, rank: Rank, member: int) -> bool:
        other = self.world.ranks.get(member)
        if member == rank.member or other is None:
            return False
        return not other.alive or other.stopped or self.between(rank.node, other.node)
