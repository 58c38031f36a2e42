"""What can go wrong, split by who can mend it.

A mistake in how resilient is called is a ValueError or TypeError that names field, value and remedy.
"""

from __future__ import annotations


class ResilientError(Exception):
    """Anything that ends a run, other than wrong arguments."""


class TrainingFailed(ResilientError):
    """The user's training code raised. Not a fault of a machine, so nothing was retried.

    The message holds the traceback, rank and step. The place to look is the training script.
    """


class RunLost(ResilientError):
    """The state was lost, or no machines came in time. The message says what was lost and what to do.

    Nobody's code is at fault. Never followed by a silent start from scratch.
    """


class RunStopped(ResilientError):
    """Somebody asked for the run to stop, or another attempt of it took over."""


class ValueNotLoaded(ResilientError):
    """What the training function returned is not in its Result, whose other fields are sound.

    A class of its own could not be sent, or not be made in the driver: a tensor on a GPU where there is none, say.
    """


class LoopError(ResilientError):
    """The training loop does something that cannot be made exact, or that would hang a rank.

    The message says which rule, where, and what to write instead.
    """


class StateDiverged(ResilientError):
    """Ranks that must hold equal control state do not: learning rates, schedulers or step counters.

    The message names the field and both values. Usually something that differs between processes
    (time, host name, rank) has found its way into the training script.
    """
