"""What happened, and what it cost: one record per change of generation, with the time of each phase.

A recovery that is interrupted by the next fault is one record: it ends with the first step that is
committed afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .plan import Plan, Restore

RecoveryKind = Literal[
    "rank lost", "node lost", "link broken", "joined", "drained", "dealt anew", "resumed", "rolled back"
]
Source = Literal["live ranks", "memory", "parity", "storage"]


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


@dataclass(slots=True, kw_only=True)
class Chronicle:
    recoveries: list[Recovery] = field(default_factory=list)
    """All that have ended, in order."""
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
    _went_back: bool = False
    """While this controller ran."""

    def lost(self, rank: int, node: str, why: str, silent_s: float, now: float, *, node_lost: bool) -> None:
        kind: RecoveryKind = "node lost" if node_lost else "rank lost"
        if self.open is None or self.open.kind not in ("rank lost", "node lost"):
            self.open = Recovery(kind=kind, began_at=now)
        elif node_lost:
            self.open.kind = kind
        self.open.lost.append({"rank": rank, "node": node, "why": why})
        self.open.detect_s = max(self.open.detect_s, silent_s)

    def created(self, plan: Plan, now: float, *, drained: bool = False) -> None:
        """drained: members of its base are not in it, as they were asked to leave."""
        if plan.kind == "initial":
            return
        if self.open is None:
            self.open = Recovery(kind="drained" if drained else _kind_of(plan), began_at=now)
        if plan.restore is not None:
            self._going_back(self.open, plan, plan.restore)
        self.open.generation, self.open.reason, self.open.ranks = plan.generation, plan.reason, plan.size
        self.open.decide_s = now - self.open.began_at
        self._created_at, self._formed_at = now, -1.0

    def _going_back(self, record: Recovery, plan: Plan, restore: Restore) -> None:
        record.source = "storage" if restore.folder else "parity" if restore.decoded else "memory"
        record.restored_step = restore.key.step
        record.replayed += max(0, self._newest + 1 - restore.key.step)
        self._newest, self._line_since, self._went_back = restore.key.step - 1, plan.generation, True

    def resumed(self, plans: Sequence[Plan]) -> None:
        """A controller that came back; what was committed it learns from ranks, keepers and the driver."""
        self._line_since = max((plan.generation for plan in plans if plan.restore is not None), default=0)

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
        if generation >= self._line_since and complete > self._newest:
            if self._newest >= 0:
                self.step_s = (now - self._newest_at) / (complete - self._newest)
            self._newest, self._newest_at = complete, now
        if self.open is None or self.open.generation != generation or self._formed_at < 0:
            return
        if complete > self._complete:
            self.open.redo_s, self.open.step = now - self._formed_at, complete
            self.recoveries.append(self.open)
            self.open = None


def _kind_of(plan: Plan) -> RecoveryKind:
    """Of a change that nobody's death began."""
    if plan.kind == "restored":
        return "rolled back" if plan.base else "resumed"
    kinds: dict[str, RecoveryKind] = {"unplanned": "link broken"}
    return kinds.get(plan.kind, "joined" if plan.joiners else "dealt anew")
