"""One rank's side of the protocol: which generation it is in, and what it does next.

Rules
    * A step t is applied only with the complete result of t.
    * `complete` is the newest step whose complete result this rank has had; it is t or t-1 while the
      rank works on step t.
    * A plan is adopted at once when it is unplanned, or when this rank joins by it. A planned one is
      held as a *proposal*, announced in every exchange's lane, and adopted by all members after the
      same step, when the lane's minimum shows that all hold it. That goes for a joiner too that has not
      yet seen the generation formed by which it joins: the others may have.
    * Adopting a plan ends the former generation for good: what its exchange would still bring is
      refused, because its number is no longer the current one.
    * A plan derived from an older generation than the newest one this rank has formed is refused:
      whoever made it did not know how far things had gone. The report says what has been formed.
    * Until a new generation has formed, only leaves owned in the former one are computed; in a planned one, its own:
      nobody stands still while it forms. Where it has joiners, not before the state at the boundary is held for them,
      which they receive while the step is under way. It can't be completed, hence not applied, without them.
      In a pipeline a rank may have to receive layers itself: it begins, a joiner too, when it has all of them that
      computing needs, while what only updates need is still on its way.
    * What a pipeline's rank has computed by a planned change that nobody has seen formed is dropped with that change:
      it was another stage's work. A joiner that has begun so parks first when it is to join once more.
    * Whoever is not in a planned generation holds it as a proposal all the same. When all have agreed it applies the
      step, and comes to rest: it goes on only if an unplanned or restored generation calls it back.
    * A rollback may be wanted before a planned generation has formed, by those that hold the state: then it never
      forms.
    * Whoever has finished a loop may go on with another one: until its function has returned nobody is left alone.
    * A restored plan is adopted at once, and whatever was held before is gone with that. What the training
      thread still brings of the former line of steps counts for nothing, until the generation has formed.

States, per generation
    adopted --Formed--> formed --ExchangeDone, with all holding a proposal--> the proposal is adopted
       |                  |                                              \\--> not in it: departed --Rested--> at rest
       |                  |
       +--FormFailed------+--ExchangeFailed--> broken: waits for the next generation
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .plan import Plan
from .seat_messages import (
    Applied,
    Apply,
    Compute,
    Discard,
    ExchangeDone,
    ExchangeFailed,
    Finished,
    Form,
    Formed,
    FormFailed,
    GoesOn,
    LeafFolded,
    Leave,
    MayBegin,
    Next,
    Park,
    PlanArrived,
    Reduce,
    Report,
    Rested,
    Rollback,
    SeatEvent,
    SeatInstruction,
    SeatReport,
    StateReceived,
    Wait,
)

__all__ = [
    "Applied",
    "Apply",
    "Compute",
    "Discard",
    "ExchangeDone",
    "ExchangeFailed",
    "Finished",
    "Form",
    "FormFailed",
    "Formed",
    "GoesOn",
    "LeafFolded",
    "Leave",
    "MayBegin",
    "Next",
    "Park",
    "PlanArrived",
    "Reduce",
    "Report",
    "Rested",
    "Rollback",
    "Seat",
    "SeatEvent",
    "SeatInstruction",
    "SeatReport",
    "StateReceived",
    "Wait",
]


@dataclass(slots=True, kw_only=True)
class Seat:
    member: int
    plan: Plan | None = None
    proposal: Plan | None = None
    forming: bool = False
    formed: int = 0
    """Newest generation this rank has seen formed."""
    broken: int = 0
    step: int = 0
    complete: int = -1
    has_state: bool = False
    """False until the state has been received, or found to be this rank's own to give."""
    held_state_in: int = 0
    """The newest generation by which this rank has come to hold the state, or gave it to others."""
    restoring: bool = False
    """From the adoption of a restored plan until its generation, or one after it, has formed: what the training thread
    has in hand counts for nothing. The same goes for a joiner that has begun before by a change that failed."""
    finished: bool = False
    departed: int = 0
    """The generation that the others go on with, and this rank does not; 0 while it has a seat."""
    at_rest: bool = False
    rollback: Rollback | None = None
    """Wanted here, and not yet under way."""
    work: frozenset[int] = frozenset()
    """Leaves that may be computed now."""
    folded: set[int] = field(default_factory=set)
    serial: int = field(default=0, compare=False)

    def handle(self, event: SeatEvent) -> tuple[SeatInstruction, ...]:
        self.serial += 1
        match event:
            case PlanArrived(plan=plan):
                return self._plan_arrived(plan)
            case MayBegin(generation=generation, complete=complete):
                return self._may_begin(generation, complete)
            case StateReceived(generation=generation, complete=complete):
                return self._state_received(generation, complete)
            case Formed(generation=generation, complete=complete):
                return self._formed(generation, complete)
            case FormFailed(generation=generation) | ExchangeFailed(generation=generation):
                return self._failed(generation)
            case Rested():
                self.at_rest = self.departed > 0
                return (Report(),)
            case LeafFolded() | Applied() | Rollback() | Finished() if self.restoring:
                return ()
            case Rollback():
                self.rollback = event if self.has_state else None  # whoever has none has nothing to go back from
                return (Report(),)
            case LeafFolded(step=step, leaf=leaf):
                return self._leaf_folded(step, leaf)
            case ExchangeDone(generation=generation, step=step, agreed=agreed):
                return self._exchange_done(generation, step, agreed)
            case Applied(step=step):
                assert step == self.step == self.complete, (event, self)
                self.step += 1
                self.folded = set()
                return ()
            case Finished(step=step) | GoesOn(step=step):
                assert step == self.step and self.finished == isinstance(event, GoesOn), (event, self)
                self.finished = not self.finished
                return (Report(),)

    def next(self) -> Next:
        """What the training thread should do now; asked again whenever something has happened."""
        if self.restoring:
            return Park()
        if self.rollback is not None:
            return Wait(reason="a rollback was asked for")
        if self.complete == self.step:
            return Apply(step=self.step)
        if self.plan is None:
            return Wait(reason="waiting to be seated")
        if self.departed:
            return Wait(reason=f"generation {self.departed} goes on without this rank")
        todo = self.work - self.folded
        if todo:
            return Compute(leaf=min(todo))
        if self.forming:
            return Wait(reason=f"forming generation {self.plan.generation}")
        if self.broken == self.plan.generation:
            return Wait(reason=f"a link of generation {self.plan.generation} broke")
        return Reduce(plan=self.plan, step=self.step)

    @property
    def at_boundary(self) -> bool:
        """Whether the state is that at the start of `step`, and nothing of the step has begun."""
        return self.complete == self.step - 1 and not self.folded and not self.work

    @property
    def awaited(self) -> bool:
        """Whether joiners wait for the state at this boundary, which this rank has yet to hold for them."""
        planned = self.plan is not None and self.plan.kind == "planned" and not self.plan.stages
        return planned and self.forming and self.has_state and self.at_boundary

    @property
    def has_begun_ahead(self) -> bool:
        """Whether this rank of a pipeline computes by a planned change that it has not seen formed."""
        planned = self.plan is not None and self.plan.kind == "planned" and bool(self.plan.stages)
        return planned and self.forming and bool(self.work)

    @property
    def settled(self) -> bool:
        """Whether no planned change is under way at this boundary."""
        if self.plan is None or self.departed:
            return False
        return not self.forming or (bool(self.work) and self.plan.kind == "unplanned")

    @property
    def newest_held(self) -> int:
        """What this rank puts into the lane: the newest plan it could switch to."""
        assert self.plan is not None
        return self.proposal.generation if self.proposal else self.plan.generation

    def report(self) -> SeatReport:
        return SeatReport(
            member=self.member,
            serial=self.serial,
            generation=self.plan.generation if self.plan else 0,
            formed=self.formed,
            broken=self.broken,
            step=self.step,
            complete=self.complete,
            finished=self.finished,
            waiting=not self.finished and isinstance(self.next(), Reduce),
            rollback=self.rollback,
            at_rest=self.at_rest,
        )

    def _plan_arrived(self, plan: Plan) -> tuple[SeatInstruction, ...]:
        newest = max(self.plan.generation if self.plan else 0, self.proposal.generation if self.proposal else 0)
        if plan.generation <= newest or (self.member not in plan.ranks and plan.kind != "planned"):
            return ()
        if plan.base < self.formed:
            return (Report(),)
        joins = self.member in plan.joiners or plan.kind == "initial"
        if plan.kind == "restored" and self.finished:
            return (Leave(),)
        if plan.kind in ("unplanned", "restored") or (self.formed == 0 and joins):
            return self._adopt(plan)
        if self.member in plan.joiners:
            return (Leave(),)
        if self.plan is not None and plan.base == self.plan.generation:
            self.proposal = plan
        return ()

    def _adopt(self, plan: Plan) -> tuple[SeatInstruction, ...]:
        goes_back = self.has_begun_ahead and self.plan is not None and plan.base < self.plan.generation
        begun_again = self.has_begun_ahead
        self.plan, self.proposal, self.forming = plan, None, True
        self.departed, self.at_rest = 0, False
        if plan.kind == "unplanned":
            # Between its base and this plan a retried beginning may have asked this rank to join again.
            self.has_state = self.has_state or self.held_state_in == plan.base
            if goes_back:
                self.work, self.folded = frozenset(), set()
                return (Discard(), Form(plan=plan))
        elif plan.kind == "restored":
            self.restoring, self.has_state, self.rollback = True, False, None
            self.work, self.folded = frozenset(), set()
        else:
            self.work, self.has_state = frozenset(), self.member not in plan.joiners
            if begun_again:
                self.restoring, self.folded = True, set()
            if self.has_state:
                self.held_state_in = plan.generation
                if plan.kind == "planned" and not plan.joiners and not plan.stages:
                    self.work = frozenset(plan.leaves_of(self.member))
        return (Form(plan=plan),)

    def _leaf_folded(self, step: int, leaf: int) -> tuple[SeatInstruction, ...]:
        assert step == self.step and leaf not in self.folded, (step, leaf, self)
        if leaf not in self.work:  # begun by the dealing of a planned change that has failed meanwhile
            self.folded = set()
            return (Discard(),)
        self.folded.add(leaf)
        return ()

    def _may_begin(self, generation: int, complete: int) -> tuple[SeatInstruction, ...]:
        if self.plan is None or generation != self.plan.generation or not (self.plan.stages or self.awaited):
            return ()
        assert self.forming and self.plan.kind == "planned", (generation, self)
        if not self.has_state:
            self.step, self.complete = complete + 1, complete
        assert complete == self.complete == self.step - 1 and not self.folded, (complete, self)
        self.work, self.restoring = frozenset(self.plan.leaves_of(self.member)), False
        return ()

    def _state_received(self, generation: int, complete: int) -> tuple[SeatInstruction, ...]:
        if self.plan is None or generation != self.plan.generation:
            return ()
        assert self.forming and not self.has_state, (generation, self)
        self.step, self.complete, self.has_state = complete + 1, complete, True
        self.folded &= self.work
        self.held_state_in = generation
        return ()

    def _formed(self, generation: int, complete: int) -> tuple[SeatInstruction, ...]:
        if self.plan is None or generation != self.plan.generation:
            return ()
        assert self.forming, (generation, self)
        if not self.has_state:
            self.step, self.has_state, self.folded = complete + 1, True, set()
        assert complete in (self.step - 1, self.step), f"more than one step apart: {complete}, {self}"
        self.complete = complete
        self.forming, self.restoring, self.formed = False, False, generation
        self.work = frozenset(self.plan.leaves_of(self.member))
        if self.folded <= self.work:
            return (Report(),)
        self.folded = set()
        return (Discard(), Report())

    def _failed(self, generation: int) -> tuple[SeatInstruction, ...]:
        if self.plan is None or generation != self.plan.generation:
            return ()
        self.broken = generation
        return (Report(),)

    def _exchange_done(self, generation: int, step: int, agreed: int) -> tuple[SeatInstruction, ...]:
        if self.plan is None or generation != self.plan.generation:
            return ()
        assert not self.forming and step == self.step == self.complete + 1, (step, self)
        self.complete = step
        if agreed <= generation:
            return ()
        assert self.proposal is not None and self.proposal.generation == agreed, (agreed, self)
        if self.member not in self.proposal.ranks:
            self.departed, self.work = agreed, frozenset()
            return ()
        return self._adopt(self.proposal)
