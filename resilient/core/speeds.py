"""How fast ranks are, and what follows: micro-batches in proportion, and stragglers that are reported or leave.

    measured --a new dealing would be 10 % faster, for a while--> dealt anew, in a planned change
             --3 times slower than the median, for long--> said; and if the user wants that, asked to leave

Medians carry what noise there is, and nothing happens before it has held for some time and for some steps. Every change
of generation begins that time anew, so a rank that is slow and fast in turns is not followed to and fro.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import planner, staging
from .events import RankLeaving
from .partition import DoesNotFit
from .plan import Plan
from .standing import Member

if TYPE_CHECKING:
    from .control import Control

WORTH_IT = 0.1
"""Share of the step's computing that another dealing has to save."""
A_WHILE_DETECTIONS, A_WHILE_STEPS = 5, 8
STRAGGLES = 3.0
"""Times the median from which on a rank is a straggler."""
LONG_WHILES = 3
LOOKS_PER_DETECTION = 4
MANY_RANKS = 200
"""With more of them one looks less often, so that what a look costs stays the same share of the time."""


@dataclass(slots=True, kw_only=True)
class Speeds:
    control: Control = field(repr=False, compare=False)
    known: dict[int, float] = field(default_factory=dict)
    """Seconds per micro-batch, of those members that have measured it."""
    uneven: bool = False
    """Whether dealing in proportion to that would have been worth it for long enough."""
    gain: float = 0.0
    """In a pipeline, the share of a step that other stages would save; looked at only after a loss, or when all layers
    have been measured."""
    stragglers: set[int] = field(default_factory=set)
    """Members that have been reported as such, and still are."""
    _generation: int = 0
    _looked_at: float = float("-inf")
    _gain_asked: tuple[int, int] = (0, -1)
    _gain_found: float = 0.0

    @property
    def a_while_s(self) -> float:
        control = self.control
        return max(A_WHILE_DETECTIONS * control.limits.detection_s, A_WHILE_STEPS * control.chronicle.step_s)

    def look(self) -> None:
        """Not at every event: with many ranks that would take more time than all else."""
        control, plan = self.control, self.control.formed
        if plan is None or plan is not control.current:
            return
        if plan.generation != self._generation:
            self._generation, self._looked_at, self.uneven = plan.generation, control.now, False
            control.for_s("uneven", False)
            self.gain = self._gain(plan) if plan.stages and plan.kind == "unplanned" else 0.0
        often_s = control.limits.detection_s / LOOKS_PER_DETECTION
        if control.now - self._looked_at < often_s * max(1.0, plan.size / MANY_RANKS):
            return
        self._looked_at = control.now
        members = (control.membership.members[number] for number in plan.members)
        self.known = {each.number: each.report.leaf_s for each in members if each.report and each.report.leaf_s > 0}
        worth_it = self._worth_it(plan)
        self.uneven = control.for_s("uneven", worth_it) >= self.a_while_s and worth_it
        if len(self.known) > 1:
            self._look_for_stragglers(plan, statistics.median_low(self.known.values()))

    def _worth_it(self, plan: Plan) -> bool:
        """Whether another dealing would save enough."""
        if not plan.stages:
            return len(self.known) == plan.size and gain(plan, self.known) >= WORTH_IT
        first = self.control.membership.first_ready()
        layers = len(first.pipeline.layer_bytes) if first is not None and first.pipeline is not None else 0
        all_known = 0 < layers <= len({layer for _, layer in self.control.timings.known})
        self.gain = self._gain(plan) if all_known or plan.kind == "unplanned" else 0.0
        return all_known and self.gain >= WORTH_IT

    def _gain(self, plan: Plan) -> float:
        """That of other stages; 0 while nobody has told what there is to know of the pipeline."""
        first = self.control.membership.first_ready()
        if first is None or first.pipeline is None:
            return 0.0
        asked = plan.generation, self.control.timings.changes
        if asked != self._gain_asked:  # planning takes long where ranks are of many speeds
            self._gain_asked = asked
            try:
                self._gain_found = staging.gain(plan, first.pipeline, self.control.timings.known)
            except DoesNotFit:
                self._gain_found = 0.0
        return self._gain_found

    def _look_for_stragglers(self, plan: Plan, usual_s: float) -> None:
        control = self.control
        for number in plan.members:
            member, times = control.membership.members[number], self.known.get(number, 0.0) / usual_s
            slow = times >= STRAGGLES and not member.leaving
            slow_s = control.for_s(f"straggler {number}", slow)
            if not slow:
                self.stragglers.discard(number)
            elif slow_s >= LONG_WHILES * self.a_while_s and number not in self.stragglers:
                self.stragglers.add(number)
                self._found(member, plan, f"it takes {times:.1f} times as long for a micro-batch as the median rank")

    def relative(self) -> dict[int, float]:
        """Speed of those members that have measured it, 1 for the median."""
        if not self.known:
            return {}
        usual_s = statistics.median_low(self.known.values())
        return {number: usual_s / leaf_s for number, leaf_s in self.known.items()}

    def _found(self, member: Member, plan: Plan, why: str) -> None:
        control = self.control
        rank = f"rank {plan.rank_of(member.number)} (node {member.node[:8]}) is a straggler: {why}"
        membership = control.membership
        others = membership.roomiest() is not None or bool(membership.everybody.count("ready"))
        enough = others or plan.size > control.limits.min_workers
        if not control.limits.evict_stragglers:
            control.say(f"{rank}; with evict_stragglers=True it would leave")
        elif member.node in membership.avoided:
            control.say(f"{rank}, as one before on this node: it stays, since there was no other node")
        elif not enough:
            control.say(f"{rank}; it stays, since {control.limits.min_workers} workers are the least")
        else:
            control.say(f"{rank}; it leaves")
            membership.avoid(member.node)
            control.leaving.rank_leaves(RankLeaving(member=member.number, why=why))


def gain(plan: Plan, known: Mapping[int, float]) -> float:
    """The share of the slowest rank's computing that another dealing would save; 0 if none is known."""
    leaf_s = filled(plan.members, known)
    now_s = planner.slowest_s(plan.leaves, leaf_s)
    return 1.0 - planner.slowest_s(planner.in_proportion(plan.micro_batches, leaf_s), leaf_s) / now_s


def filled(members: Sequence[int], known: Mapping[int, float]) -> list[float]:
    """By rank; who has not measured yet counts as the median, and if nobody has, all as equal."""
    usual_s = statistics.median_low(known.values()) if known else 1.0
    return [known.get(number, usual_s) for number in members]
