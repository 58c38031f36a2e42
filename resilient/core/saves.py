"""Which steps' states are made durable: every so many steps, or every so many seconds, and the last one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Saves:
    """One rank's. What one rank finds due is due for all: they agree in the lane.

    every_steps, every_s: one of them. last_step: length of the run, if it is known; its final state is saved.
    """

    every_steps: int | None = None
    every_s: float | None = None
    last_step: int | None = None
    _saved_step: int | None = None
    _saved_at: float | None = None

    def is_due(self, step: int, now: float) -> bool:
        """Whether the state at the start of `step` is to be made durable. Also says when the first step was seen."""
        if self._saved_step is None or step <= self._saved_step:  # the run begins, or has gone back
            self._saved_step, self._saved_at = step - 1, now
        assert self._saved_at is not None
        if step == self.last_step:
            return True
        if self.every_steps is not None:
            return step // self.every_steps > self._saved_step // self.every_steps
        return self.every_s is not None and now - self._saved_at >= self.every_s

    def saved(self, step: int, now: float) -> None:
        """All ranks capture it, to be made durable."""
        self._saved_step, self._saved_at = step, now
