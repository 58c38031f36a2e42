"""What happened, and what it cost: one record per change of generation, with the time of each phase.

A recovery that is interrupted by the next fault is one record: it ends with the first step that is
committed afterwards.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .figures import Figures
from .plan import Plan, Restore
from .seat_messages import Rollback
from .spent import Interruption

RecoveryKind = Literal[
    "rank lost", "node lost", "link broken", "joined", "drained", "dealt anew", "resumed", "rolled back"
]
RECOVERY_KINDS: tuple[RecoveryKind, ...] = get_args(RecoveryKind)
PLANNED_KINDS: tuple[RecoveryKind, ...] = ("joined", "drained", "dealt anew")
Source = Literal["live ranks", "memory", "parity", "storage"]


USUAL_STEPS = 15
MOST_RECOVERIES = 500
"""So many are kept for whoever has not heard of them yet: events.jsonl and the driver have all."""


@dataclass(slots=True, kw_only=True)
class Recovery:
    """One change of generation. All phases in seconds, as the controller saw them."""

    kind: RecoveryKind
    began_at: float
    """Controller's clock when it learned of the fault or decided the change."""
    lost: list[dict[str, str | int]] = field(default_factory=list)
    """Rank, node and cause of each loss."""
    generation: int = 0
    reason: str = ""
    ranks: int = 0
    step: int = -1
    """First step committed afterwards; -1 while there is none."""
    detect_s: float = 0.0
    """From the last sign of life to the verdict; 0 where the operating system told at once."""
    decide_s: float = 0.0
    """From the verdict to the new generation on record."""
    form_s: float = 0.0
    """From there until its ranks were connected and level (and joiners held the state)."""
    redo_s: float = 0.0
    """From there to the next committed step: the lost micro-batches and the rest of the step."""
    source: Source = "live ranks"
    """Where the state came from: ranks that held it, keepers' own copies, or parity too."""
    restored_step: int = -1
    """The step whose state was restored; -1 if nobody went back."""
    replayed: int = 0
    """Steps that had been committed before, and were computed again."""

    @property
    def total_s(self) -> float:
        return self.detect_s + self.decide_s + self.form_s + self.redo_s

    @property
    def interruption(self) -> Interruption:
        return Interruption(
            detect_s=self.detect_s,
            form_s=self.decide_s + self.form_s,
            restored=self.restored_step >= 0,
            planned=self.kind in PLANNED_KINDS,
        )


@dataclass(slots=True, kw_only=True)
class Chronicle:
    recoveries: list[Recovery] = field(default_factory=list)
    """The newest that have ended, in order."""
    ended: int = 0
    """How many have."""
    open: Recovery | None = None
    _created_at: float = 0.0
    _formed_at: float = -1.0
    _complete: int = -1
    _newest: int = -1
    """Newest step known to be committed on the line that the run is on."""
    _line_since: int = 0
    """The generation in which the run went back to the last snapshot: what earlier ones did counts no more."""
    _newest_at: float = 0.0
    step_s: float = 0.0
    """What the last steps took, as far as is known."""
    figures: Figures = field(default_factory=Figures)
    _usual_s: deque[float] = field(default_factory=lambda: deque(maxlen=USUAL_STEPS))
    """What the last steps took between which nothing happened."""
    _rollback: Rollback | None = None
    """The last one that was asked for."""
    _recorded_in: int = 0
    """The newest generation when the controller before last put its figures on record."""
    _went_back: bool = False
    """While this controller ran."""

    @property
    def usual_s(self) -> float:
        """What a step takes, the median of the last ones; 0 while it is not known."""
        return statistics.median(self._usual_s) if self._usual_s else 0.0

    @property
    def committed_at(self) -> float:
        """When the newest step was committed; 0 if none was."""
        return self._newest_at

    def lost(self, rank: int, node: str, why: str, silent_s: float, now: float, *, node_lost: bool) -> None:
        kind: RecoveryKind = "node lost" if node_lost else "rank lost"
        self.figures.failures["node" if node_lost else "rank"] += 1
        if self.open is None or self.open.kind not in ("rank lost", "node lost"):
            self.open = Recovery(kind=kind, began_at=now)
        elif node_lost:
            self.open.kind = kind
        self.open.lost.append({"rank": rank, "node": node, "why": why})
        self.open.detect_s = max(self.open.detect_s, silent_s)

    def created(self, plan: Plan, now: float, *, drained: bool = False, dealt_again: int = 0) -> None:
        """drained: members of its base are not in it, as they were asked to leave. dealt_again: micro-batches of
        members that are lost."""
        if plan.kind == "initial":
            return
        self.figures.recomputed += dealt_again
        if self.open is None:
            self.open = Recovery(kind="drained" if drained else _kind_of(plan), began_at=now)
            self.figures.failures["link"] += self.open.kind == "link broken"
        if plan.restore is not None:
            self._going_back(self.open, plan, plan.restore)
        self.open.generation, self.open.reason, self.open.ranks = plan.generation, plan.reason, plan.size
        self.open.decide_s = now - self.open.began_at
        self._created_at, self._formed_at = now, -1.0

    def _going_back(self, record: Recovery, plan: Plan, restore: Restore) -> None:
        record.source = "storage" if restore.folder else "parity" if restore.decoded else "memory"
        record.restored_step = restore.key.step
        lost = max(0, self._newest + 1 - restore.key.step)
        record.replayed += lost
        self.figures.lost_steps += lost
        self._newest, self._line_since, self._went_back = restore.key.step - 1, plan.generation, True

    def rolled_back(self, rollback: Rollback) -> None:
        """Ranks ask to go back; said again and again, and counted once."""
        if rollback != self._rollback:
            self._rollback = rollback
            self.figures.failures["digest" if rollback.skip_to < (rollback.skip_from or 0) else "loss"] += 1

    def resumed(self, plans: Sequence[Plan]) -> None:
        """A controller that came back; what was committed it learns from ranks, keepers and the driver."""
        for plan in plans:
            if plan.restore is None:
                continue
            self._line_since = max(self._line_since, plan.generation)
            if plan.generation > self._recorded_in:  # the former one did not live to put it on record
                self.figures.lost_steps += max(0, self._newest + 1 - plan.restore.key.step)
                self._newest = min(self._newest, plan.restore.key.step - 1)

    def as_record(self, generation: int) -> dict[str, Any]:
        """For the controller that comes after this one. generation: the newest that was created."""
        return {"generation": generation, "complete": self._newest, "figures": self.figures.as_record()}

    def take_up(self, record: Mapping[str, Any], gap_s: float) -> None:
        """Before `resumed`: count on from what the controller before has put on record, so long ago."""
        self._recorded_in, self._newest = record["generation"], record["complete"]
        self.figures = Figures.from_record(record["figures"], gap_s)

    def ended_after(self, count: int) -> list[Recovery]:
        """Those that ended after the first so many, as far as they are kept."""
        return self.recoveries[max(0, count - self.ended + len(self.recoveries)) :]

    def was_committed(self, complete: int) -> None:
        """The driver has heard so from the controller before this one."""
        if not self._went_back:
            self._newest = max(self._newest, complete)

    def formed(self, generation: int, complete: int, now: float) -> None:
        if self.open is None or self.open.generation != generation:
            return
        self.open.form_s = now - self._created_at
        self._formed_at, self._complete = now, complete

    def committed(self, generation: int, complete: int, now: float) -> None:
        """A rank of this generation has the complete result of step `complete`."""
        ends = self.open is not None and self._ends(self.open, generation, complete)
        if generation >= self._line_since and complete > self._newest:
            self._step_committed(complete, now, self.open.interruption if ends and self.open is not None else None)
        if ends and self.open is not None:
            self.open.redo_s, self.open.step = now - self._formed_at, complete
            self._recovered(self.open)
            self.open = None

    def _ends(self, record: Recovery, generation: int, complete: int) -> bool:
        return record.generation == generation and self._formed_at >= 0 and complete > self._complete

    def _step_committed(self, complete: int, now: float, cause: Interruption | None) -> None:
        figures = self.figures
        if self._newest >= 0:
            self.step_s = (now - self._newest_at) / (complete - self._newest)
            if cause is None:
                self._usual_s.append(self.step_s)
        figures.spent.committed(complete, now, self.usual_s, cause)
        figures.steps += complete - self._newest
        figures.newest = max(figures.newest, complete)
        self._newest, self._newest_at = complete, now

    def _recovered(self, record: Recovery) -> None:
        self.recoveries.append(record)
        self.ended += 1
        del self.recoveries[:-MOST_RECOVERIES]
        self.figures.recovered(
            record.kind,
            {
                "detect": record.detect_s,
                "decide": record.decide_s,
                "form": record.form_s,
                "redo": record.redo_s,
                "total": record.total_s,
            },
        )


def _kind_of(plan: Plan) -> RecoveryKind:
    """Of a change that nobody's death began."""
    if plan.kind == "restored":
        return "rolled back" if plan.base else "resumed"
    kinds: dict[str, RecoveryKind] = {"unplanned": "link broken"}
    return kinds.get(plan.kind, "joined" if plan.joiners else "dealt anew")
