"""What a rank tells the controller: how it stands, what has become of its steps, and how it has ended.

Any message may be lost, with the controller that it was meant for or on its way: all of it is told again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from actors.rank import Host
from snapshot.core.digest import StatePart

from .core.events import RankCrashed, RankFailed, RankReady, RankReported, RankReturned
from .core.pace import Pace
from .core.plan import Address
from .core.seat import Seat
from .records import StepValues, Untold
from .stage_side import StageSide
from .team import Loop


class Telling:
    """One rank's. Called by all of its threads."""

    def __init__(self, host: Host, seat: Seat, untold: Untold, pace: Pace, changed: threading.Condition) -> None:
        """changed: whoever holds it is alone with seat, untold and pace."""
        self._host, self._seat, self._untold, self._pace, self._changed = host, seat, untold, pace, changed
        self._stage: StageSide | None = None
        self.ended_with: Callable[[], Mapping[str, str]] = dict
        """Of each object in the state that the loop ended with, by name, the digest."""
        self.stalled: Callable[[], bool] = lambda: False
        """Whether this rank waits for others, and nothing has come from them for long."""
        self.verified: Callable[[], int] = lambda: -1
        """The newest step at whose start all ranks are known to have held the same state."""
        self._ready: RankReady | None = None
        self._returned: RankReturned | None = None
        self._failed: RankFailed | None = None

    def enter(self, loop: Loop, digest: str, fields: str) -> None:
        """The rank has reached its training loop. digest, fields: what the probe has found."""
        self._stage, self.ended_with = loop.stage, loop.ended_with
        self._ready = RankReady(
            member=self._host.member,
            node=self._host.node,
            address=Address(
                host=self._host.ip,
                port=self._host.store_port,
                post=loop.stage.post_port if loop.stage else 0,
            ),
            micro_batches=loop.sums.micro_batches,
            steps=loop.steps,
            probe=digest,
            probe_fields=fields,
            pipeline=loop.shape,
        )

    def report(self) -> None:
        """Say how things stand; repeated from time to time, since any message may be lost."""
        with self._changed:
            report = replace(self._seat.report(), leaf_s=self._pace.leaf_s, stalled=self.stalled())
            if self._stage is not None:
                timing = self._stage.timing
                report = replace(report, layer_s=timing.layer_s, idle=timing.idle, bubbles=timing.bubbles.told())
            messages: list[Any] = [RankReported(report=report)]
            for once in (self._ready, self._failed, self._returned):
                if once is not None:
                    messages.insert(0, once)
            if self._returned is not None:  # the run may end with this message: rows go before it
                messages[:0] = self._rows()
        self._host.tell(*messages)

    def recorded_through(self, step: int) -> None:
        """The driver has everything up to this step. What it should have by now, and has not, is told again."""
        with self._changed:
            self._untold.acknowledged(step)
            rows = self._rows(overdue=True)
        if rows:
            self._host.tell(*rows)

    def repeat_records(self) -> None:
        with self._changed:
            rows = self._rows()
        if rows:
            self._host.tell(*rows)

    def _rows(self, *, overdue: bool = False) -> tuple[StepValues, ...]:
        """None while the state is not that of the plan: what a snapshot brings may not be there yet."""
        plan = self._seat.plan
        if plan is None or self._seat.formed != plan.generation:
            return ()
        if overdue:
            return self._untold.overdue(plan.branch, speaks_for_all=plan.rank_of(self._host.member) == 0)
        return self._untold.rows(plan.branch)

    def crashed_here(self, text: str) -> None:
        """An error of the machine: another process takes this one's place."""
        self._host.tell_at_last(RankCrashed(member=self._host.member, step=self._seat.step, traceback=text))

    def failed(self, step: int, text: str) -> None:
        self._failed = RankFailed(member=self._host.member, step=step, traceback=text)
        self.report()

    def returned(self, digest: str | StatePart) -> None:
        whole, part = (digest, None) if isinstance(digest, str) else ("", digest)
        self._returned = RankReturned(
            member=self._host.member,
            step=self._seat.step,
            digest=whole,
            part=part,
            objects=tuple(sorted(self.ended_with().items())),
            verified=self.verified(),
        )
        self.report()
