"""What happens to a rank's seat, what it instructs, what the training thread does next, and what is reported."""

from __future__ import annotations

from dataclasses import dataclass, field

from .bubbles import Bubble
from .plan import Plan

# What happens to a seat.


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanArrived:
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StateReceived:
    """A joiner holds the state at the start of step complete + 1; to be told before it enters the barrier.

    Once anybody has seen the generation formed, this rank may be the only one left that holds it.
    """

    generation: int
    complete: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MayBegin:
    """Step complete + 1 may begin here, though the generation has not formed.

    Without stages: the state at this boundary is held for joiners. In a pipeline: of this rank's layers all that
    forward and backward need is here, and what only updates need is still on its way.
    """

    generation: int
    complete: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Formed:
    """The group exists, its members are at most one step apart again, and joiners hold the state."""

    generation: int
    complete: int
    """Newest step whose complete result this rank now has had, -1 for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormFailed:
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafFolded:
    step: int
    leaf: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeDone:
    generation: int
    step: int
    agreed: int
    """Lane minimum of the newest plan held: a number above `generation` makes all members switch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeFailed:
    generation: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The training loop has come back for its next micro-batch after a commit: a step boundary."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The training loop has ended at a boundary."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GoesOn:
    """After a loop that has ended the training function has begun another one."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rested:
    """The training thread of a rank that the others go on without has applied the last step, and told all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """The training loop wants to go back to a snapshot of step `back_to` or before, and leave out some data.

    skip_from, skip_to: the first and last position in the data to leave out. No first one: from where the
    snapshot is.
    """

    back_to: int
    skip_from: int | None
    skip_to: int
    why: str
    suspects: tuple[int, ...] = ()
    """Members whose state is another than the others': not to be believed, and to be replaced."""


SeatEvent = (
    PlanArrived
    | MayBegin
    | StateReceived
    | Formed
    | FormFailed
    | LeafFolded
    | ExchangeDone
    | ExchangeFailed
    | Applied
    | Rested
    | Rollback
    | Finished
    | GoesOn
)


# What is to be done, by the threads around the seat.


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Give up the former group, if there is one, and form this plan's."""

    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Tell the controller how things stand here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """Drop the partial sums of this step: they cover leaves that are another rank's now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """End this process: it held state that the others went on without, and cannot take theirs."""


SeatInstruction = Form | Report | Discard | Leave


# What the training thread does next.


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    leaf: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    plan: Plan
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Park:
    """Drop this step, leave the user's code and keep hands off the state: a snapshot takes its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    reason: str


Next = Compute | Reduce | Apply | Park | Wait


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatReport:
    """How a rank stands; sent whenever it changes and from time to time."""

    member: int
    generation: int
    formed: int
    broken: int
    """The generation whose group failed here, 0 if none."""
    step: int
    complete: int
    finished: bool
    waiting: bool
    """Whether it has computed all that is its own, and waits for the others to have done so."""
    rollback: Rollback | None = None
    at_rest: bool = False
    """The others go on without this rank, and it has nothing more to do or to tell."""
    leaf_s: float = field(default=0.0, compare=False)
    """What a micro-batch takes here, as it was measured; 0 while that is not known."""
    layer_s: tuple[tuple[int, float], ...] = field(default=(), compare=False)
    """In a pipeline, of its layers: number, and what a micro-batch takes in it, forward and backward."""
    idle: float = field(default=0.0, compare=False)
    """In a pipeline, the share of its newest step for which it had nothing to do."""
    bubbles: tuple[Bubble, ...] = field(default=(), compare=False)
    """The same of all steps so far."""
    stalled: bool = field(default=False, compare=False)
    """It waits for others of its generation, and nothing has come from them for long."""
    serial: int = field(default=0, compare=False)
    """Grows with everything that happens to the seat: of two reports the greater is the later one."""
