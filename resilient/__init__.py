"""A fault-tolerant training runtime for PyTorch on Ray.

    @resilient.train(workers=(2, 4))
    def main(run: resilient.Run): ...

Nothing here imports torch before it is needed: controllers and keepers start in one second, not five.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .api import TrainFunction, train
from .check_report import CheckReport
from .errors import LoopError, ResilientError, RunLost, RunStopped, StateDiverged, TrainingFailed, ValueNotLoaded
from .job import Checkpoint, Snapshot
from .result import Result

if TYPE_CHECKING:
    from .loading import load
    from .run import Run

__all__ = [
    "CheckReport",
    "Checkpoint",
    "LoopError",
    "ResilientError",
    "Result",
    "Run",
    "RunLost",
    "RunStopped",
    "Snapshot",
    "StateDiverged",
    "TrainFunction",
    "TrainingFailed",
    "ValueNotLoaded",
    "load",
    "train",
]

# Quiet, unless whoever imports this sets logging up.
logging.getLogger("resilient").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name == "Run":
        from .run import Run

        return Run
    if name == "load":
        from .loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
