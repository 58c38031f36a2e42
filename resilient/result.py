"""What a run returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import ValueNotLoaded


@dataclass(frozen=True, slots=True)
class NotLoaded:
    """In place of a value that could not be brought from rank 0 to the driver."""

    why: str
    error: Exception | None = None


def loaded(value: bytes | None) -> Any:
    """What was packed on a rank. A NotLoaded if that can't be had in this process."""
    from ray import cloudpickle

    try:
        return cloudpickle.loads(value) if value is not None else None
    except Exception as error:  # noqa: BLE001  whatever the user's class raises as it is made, the run has its Result
        return NotLoaded(f"can't be loaded by the driver ({type(error).__name__}: {error})", error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The outcome of a run that has reached its end."""

    step: int
    """Steps committed."""
    metrics: Sequence[dict[str, float]]
    """One row per step: step, loss (mean over its micro-batches), and what was logged; of the steps that this
    attempt trained. If a finished run was submitted again, those of the attempts before it, as far as the head node of
    the cluster still has them in its folder of runs; none with `local`. However many there are, memory holds a few
    thousand: the others are read from a temporary file. `list(result.metrics)` makes a list, which JSON takes too."""
    recoveries: Sequence[dict[str, Any]] = field(default_factory=list)
    """One per change of generation: kind, step, generation, ranks, reason, what was lost, and the seconds
    of each phase (detect_s, decide_s, form_s, redo_s, total_s). Where the state was restored from a snapshot:
    source ("memory", "parity" or "storage"; otherwise "live ranks"), restored_step, and how many steps were
    replayed."""
    bubbles: list[dict[str, Any]] = field(default_factory=list)
    """In a pipeline, one per stage of each layout that the run was in: ranks (how many each stage has), stage (its
    number), idle (the mean share of a step's forward and backward for which a rank of it had nothing to do),
    by_schedule (what the schedule alone leaves in an even pipeline; None where it is uneven), rank_steps (over how many
    steps idle is the mean, counted once for each rank). Steps that a change of generation disturbed don't count."""
    snapshots: dict[str, float] = field(default_factory=dict)
    """What rank 0's snapshots did and cost: captured, skipped, torn, blocked_s, interval, protected (step)."""
    checkpoints: dict[str, Any] = field(default_factory=dict)
    """What came of checkpoints: durable (step of the newest one, -1 for none), committed, failures, last_failure,
    stored_bytes (of the newest one)."""
    digest: str
    """xxh3-128 of the final state: of its skeleton, and of the digests of its chunks. It covers the bits of parameters,
    buffers, optimizer, scheduler and run.state."""
    returned: Any = None
    """The same as `value`, or the `NotLoaded` in its place."""

    @property
    def value(self) -> Any:
        """What the training function returned on rank 0. Raises ValueNotLoaded if it could not be brought here."""
        if isinstance(self.returned, NotLoaded):
            raise ValueNotLoaded(
                f"what the training function returned on rank 0 {self.returned.why}. The run has finished and the rest "
                "of its Result is sound; return what every process can load: numbers, strings, tensors on the CPU"
            ) from self.returned.error
        return self.returned
