"""What a rank tells the controllers, again and again: how it stands, that it is ready, that it has returned."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from resilient.core.events import RankReady, RankReported, RankReturned
from resilient.core.plan import Address

from .stages import told_at_the_end

if TYPE_CHECKING:
    from .rank import Rank

USUAL_LEAF_S = 0.09
AGAIN_S = 0.5


class Telling:
    def __init__(self, rank: Rank) -> None:
        self.rank, self.world = rank, rank.world

    def report(self) -> None:
        report = replace(self.rank.seat.report(), stalled=self.world.silent.stalls(self.rank))
        if self.world.speeds.active and self.world.setting.pipeline:
            report = replace(report, layer_s=self._layer_s())
        elif self.world.speeds.active:
            report = replace(report, leaf_s=self.rank.pace.leaf_s)
        self._tell(RankReported(report=report))

    def _layer_s(self) -> tuple[tuple[int, float], ...]:
        """By layer, as it was measured."""
        layer_s = USUAL_LEAF_S / self.world.setting.layers * self.world.speeds.usual(self.rank.node)
        return tuple((layer, layer_s) for layer in self.rank.layers if self.rank.seat.step > 0)

    def repeat(self) -> None:
        self.report()
        self.world.drains.repeated(self.rank)
        if self.rank.ready:
            self.ready()
        if self.rank.returned:
            self.returned()
        self.rank.later(AGAIN_S, self.repeat)

    def ready(self) -> None:
        self._tell(
            RankReady(
                member=self.rank.member,
                node=self.rank.node,
                address=Address(host=self.rank.node, port=self.rank.member),
                micro_batches=self.world.setting.micro_batches,
                steps=self.world.setting.steps,
                probe="equal",
                probe_fields="equal",
                pipeline=self.world.setting.pipeline,
            )
        )

    def returned(self) -> None:
        rank = self.rank
        digest, part = told_at_the_end(rank.passing.plan, rank.member, rank.state, self.world.setting.layers)
        plan = rank.passing.plan if rank.seat.plan is None else rank.seat.plan
        verified = rank.capturing.verified_on(plan.branch)
        self._tell(RankReturned(member=rank.member, step=rank.seat.step, digest=digest, part=part, verified=verified))

    def _tell(self, event: RankReported | RankReady | RankReturned) -> None:
        self.world.to_controllers(self.rank.node, lambda shell: shell.take(event))
