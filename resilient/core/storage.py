"""What is known of the checkpoints on storage, and which of them to go on from.

    nothing known --look--> asked --StorageSeen--> seen
                              ^---- error: asked again after a while

Storage is asked only when it may be needed: at the start of a run, and when memory holds nothing that can be read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from snapshot.core.branches import Lineage
from snapshot.core.inventory import CheckpointFound

from .events import StorageSeen
from .instructions import Instruction, LookAtStorage

ASK_AGAIN_S = 2.0
TRIES, DEATHS = 2, 5
"""So often a checkpoint may fail to be read before it is passed over, and so often somebody may die meanwhile: that may
be its doing, but need not."""
ANSWER_LIMIT_S = 60.0
"""How long storage may take to answer before it is asked again."""


@dataclass(slots=True, kw_only=True)
class Storage:
    """attempt: this one's number; what later ones have written is not touched."""

    attempt: int
    first: str = ""
    """The folder that this attempt began from, if that was on storage."""
    own_only: bool = False
    """Whether only this attempt's checkpoints count, and the one that it began from."""
    checkpoints: tuple[CheckpointFound, ...] | None = None
    """None as long as storage has not answered."""
    unread: Counter[str] = field(default_factory=Counter)
    """How often each folder could not be read: it gives way to an older one."""
    deaths: Counter[str] = field(default_factory=Counter)
    """How often somebody died while each was being read."""
    error: str = ""
    failing_since: float | None = None
    _asked: int = 0
    _asked_at: float | None = None
    _waiting: bool = False

    def again(self) -> None:
        """There may be newer ones by now."""
        self.checkpoints, self._asked_at, self._waiting = None, None, False

    def restored(self) -> None:
        """What was being read could be."""
        self.unread.clear()
        self.deaths.clear()

    def look(self, now: float) -> tuple[Instruction, ...]:
        if self.checkpoints is not None:
            return ()
        wait_s = ANSWER_LIMIT_S if self._waiting else ASK_AGAIN_S
        if self._asked_at is not None and now - self._asked_at < wait_s:
            return ()
        if self._waiting:
            self._failed(f"it has not answered within {ANSWER_LIMIT_S:.0f} s", now)
        self._asked, self._asked_at, self._waiting = self._asked + 1, now, True
        return (LookAtStorage(asked=self._asked),)

    def seen(self, event: StorageSeen, now: float) -> None:
        if event.asked != self._asked:
            return
        self._waiting, self._asked_at = False, now
        if event.error:
            self._failed(event.error, now)
        else:
            self.error, self.failing_since, self.checkpoints = "", None, event.checkpoints

    def _failed(self, error: str, now: float) -> None:
        self.error = error
        self.failing_since = now if self.failing_since is None else self.failing_since

    def silent_for_s(self, now: float) -> float:
        """How long its answer has been waited for."""
        return now - self._asked_at if self._waiting and self._asked_at is not None else 0.0

    def failing_for_s(self, now: float) -> float:
        return 0.0 if self.failing_since is None else now - self.failing_since

    def newest(self, lineage: Lineage | None, step: int | None = None) -> CheckpointFound | None:
        """The newest to go on from, on the newest branch's line if the branches are known; of this step if one is
        given."""
        found = [
            checkpoint
            for checkpoint in self.checkpoints or ()
            if self._counts(checkpoint)
            and (step is None or checkpoint.key.step == step)
            and (lineage is None or lineage.holds(checkpoint.key.branch, checkpoint.key.step))
        ]
        return max(found, key=lambda checkpoint: checkpoint.newness, default=None)

    def _counts(self, checkpoint: CheckpointFound) -> bool:
        if checkpoint.key.attempt > self.attempt:
            return False
        if self.unread[checkpoint.folder] >= TRIES or self.deaths[checkpoint.folder] >= DEATHS:
            return False
        return not self.own_only or checkpoint.key.attempt == self.attempt or checkpoint.folder == self.first
