"""A rank's snapshots as its team agrees on them: what it wishes for, and what it captures at which boundary."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from snapshot.core.lifecycle import Ordinal

from .core.lane import Agreed, Wish
from .core.plan import Plan
from .core.seat import Seat
from .snapshots import Seating, Snapshots
from .stage_side import StageSide
from .team import Loop


class Capturing:
    """One rank's. In a run without snapshots there is nothing to wish for, to capture, or to wait for."""

    def __init__(
        self,
        snapshots: Snapshots | None,
        seat: Seat,
        objects: Callable[[], Mapping[str, object]],
        changed: threading.Condition,
    ) -> None:
        """objects: all that makes up the state. changed: whoever holds it is alone with the seat."""
        self._snapshots, self._seat, self._objects, self._changed = snapshots, seat, objects, changed
        self._loop: Loop | None = None
        self._to_capture: tuple[int, Seating, bool] | None = None
        """The step at whose start all ranks capture the state, under which membership, and whether to make it
        durable."""
        self._captured_layers = range(0)
        """Of a pipeline, those that this rank held at the newest capture."""

    def enter(self, loop: Loop) -> None:
        """The rank has reached its training loop."""
        self._loop = loop

    @property
    def _stage(self) -> StageSide | None:
        return None if self._loop is None else self._loop.stage

    # By the training thread

    def boundary(self) -> None:
        """The state at the start of a step stands: it is captured if all ranks have agreed to."""
        if self._snapshots is None:
            return
        with self._changed:
            plan, step, agreed = self._seat.plan, self._seat.step, self._to_capture
            self._to_capture = None
        if plan is None or self._seat.restoring:
            return
        seating = self._seating(plan)
        wanted = agreed is not None and agreed[0] == step
        if wanted and agreed is not None and agreed[1] != seating:
            if plan.kind == "unplanned":  # somebody has died since, whose share nobody can capture
                return
            seating = agreed[1]
        durable = wanted and agreed is not None and agreed[2]
        ordinal = Ordinal(plan.branch, step)
        stage = self._stage
        if stage is None:
            self._snapshots.boundary(ordinal, self._objects(), seating, wanted=wanted, durable=durable)
        elif not stage.spelled_anew():  # else the others would spell another structure than this rank
            self._captured_layers = stage.held
            self._snapshots.boundary(
                ordinal,
                self._objects(),
                seating,
                wanted=wanted,
                durable=durable,
                ranges=stage.captured,
                compared=stage.whereabouts.is_common,
            )

    def account(self) -> dict[str, float]:
        return {} if self._snapshots is None else self._snapshots.account()

    # By any thread

    def gate(self) -> None:
        """Returns when the state may be written, and some of its memory given back: nothing is copied from it any
        more."""
        if self._snapshots is not None:
            self._snapshots.gate()

    # By a generation's thread

    def wish(self, plan: Plan, step: int) -> Wish:
        """What this rank brings into the lane about the snapshot of the state after `step`."""
        if self._snapshots is None:
            return Wish()
        steps = self._loop.steps if self._loop is not None else None
        ordinal = Ordinal(plan.branch, step + 1)
        wish = self._snapshots.wish(ordinal, plan.generation, steps, renewed=plan.base > 0)
        if self._stage is not None and self._stage.held != self._captured_layers:
            return replace(wish, digest=None)  # of other layers than those of the ranks that it would be compared with
        return wish

    def agreed(self, plan: Plan, step: int, agreed: Agreed) -> None:
        """What the lane says about the same."""
        if self._snapshots is not None:
            self._snapshots.agreed(Ordinal(plan.branch, step + 1), agreed, plan.generation)

    def exchanged(self, plan: Plan, step: int, agreed: Agreed) -> None:
        """The result of `step` is here: its end is the boundary that was agreed on. With `changed` held."""
        if agreed.capture:
            self._to_capture = step + 1, self._seating(plan), agreed.save

    def forget(self) -> None:
        """The state is to be that of a snapshot: what was agreed on before is void. With `changed` held."""
        self._to_capture = None

    def verified(self, plan: Plan) -> int:
        return -1 if self._snapshots is None else self._snapshots.verified(plan.branch)

    def trust(self, ordinal: Ordinal) -> None:
        if self._snapshots is not None:
            self._snapshots.trust(ordinal)

    def _seating(self, plan: Plan) -> Seating:
        return Seating(generation=plan.generation, rank=plan.rank_of(self._seat.member), world=plan.size)
