"""One rank: the real seat, and around it the training thread and the control thread as automata."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from resilient.core.detector import Vital
from resilient.core.events import SnapshotProtected
from resilient.core.lane import Agreed
from resilient.core.pace import Pace
from resilient.core.plan import Plan, Restore
from resilient.core.schedule import Action
from resilient.core.seat import (
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
    PlanArrived,
    Reduce,
    Report,
    Rested,
    Seat,
    SeatInstruction,
    StateReceived,
)
from snapshot.core.lifecycle import Ordinal

from .capturing import Capturing
from .passing import Passing
from .stages import layers_of
from .telling import Telling
from .truth import NOBODYS, Complete, State, leaf_values, next_state, state_at_start

if TYPE_CHECKING:
    from .world import World


class Rank:
    def __init__(self, world: World, member: int, node: str) -> None:
        self.world, self.member, self.node = world, member, node
        self.seat = Seat(member=member)
        self.alive = True
        self.stopped = False
        self.forgotten = False
        """Whether its keeper no longer shows it: the controllers have had time to learn of its death."""
        self.ready = False
        self.returned = False
        self.state = state_at_start(world.setting.layers)
        """Beside the layers that are held there may be others, which count for nothing."""
        self.layers = range(0 if world.setting.pipeline else world.setting.layers)
        """Those whose state this rank holds."""
        self.begun: Plan | None = None
        """The planned change by which it works on a step that was begun before the generation has formed."""
        self._goes_back = False
        """Another plan has been adopted since, that was made without that change."""
        self.partial: dict[int, dict[int, int]] = {}
        """By leaf and layer."""
        self.reduced: tuple[int, dict[int, int]] | None = None
        """A step, and its stage's sums, from when this rank has them."""
        self.kept: Complete | None = None
        """The complete result of a step, to be applied here and served to others."""
        self.received_result: tuple[int, Complete] | None = None
        """Got while leveling in this generation: counts when it has formed."""
        self.held: tuple[int, State] | None = None
        """A generation, and the state at its first boundary, for joiners."""
        self.capturing = Capturing(self)
        self.passing = Passing(self)
        self.telling = Telling(self)
        self.loaded: tuple[int, Restore] | None = None
        """The generation for which this rank has last loaded a snapshot, and which."""
        self._busy = False
        self._stale = False
        """What is in hand counts for nothing."""
        self._in_second_loop = self._back_in_first_loop = False
        self._waiting_room: list[Callable[[], None]] = []
        self._submitted: tuple[int, int] | None = None
        self._work = 0
        self.pace = Pace()

    def begin(self) -> None:
        self.world.tell(f"rank {self.member} starts on {self.node}")
        self.later(self.world.rng.uniform(0.05, 0.6), self.telling.repeat)
        self.later(self.world.rng.uniform(0.3, 2.0), self._reach_loop)

    # Time passes for a process only while it lives and is not stopped.

    def later(self, delay: float, action: Callable[[], None]) -> None:
        self.world.at(delay, lambda: self.run(action))

    def run(self, action: Callable[[], None]) -> None:
        if not self.alive:
            return
        if self.stopped:
            self._waiting_room.append(action)
        else:
            action()

    def stop(self) -> None:
        self.world.tell(f"rank {self.member} is stopped")
        self.stopped = True

    def go_on(self) -> None:
        if not (self.alive and self.stopped):
            return
        self.world.tell(f"rank {self.member} goes on")
        self.stopped = False
        waiting, self._waiting_room = self._waiting_room, []
        for action in waiting:
            self.run(action)

    def vital(self) -> Vital:
        if not self.alive:
            self.later_forgotten()
        activity = "ended" if self.returned else "computing" if self._busy else "waiting" if self.ready else "starting"
        return Vital(
            member=self.member,
            alive=self.alive,
            stopped=self.stopped and self.alive,
            activity=activity,  # type: ignore[arg-type]
            work=self._work,
            longest_s=0.1,
        )

    def later_forgotten(self) -> None:
        def forget() -> None:
            self.forgotten = True

        self.world.at(10.0, forget)

    # Control thread

    def plan_arrived(self, plan: Plan) -> None:
        refused = self.seat.plan is not None and plan.generation > self.seat.plan.generation
        refused = refused and plan.base < self.seat.formed
        if refused:
            self.world.seen["refused a plan older than what had formed"] += 1
        if self.seat.proposal is not None and plan.generation > self.seat.proposal.generation:
            self.world.seen["proposal cancelled"] += 1
        if self.seat.formed == 0 and self.seat.plan is not None and plan.base == self.seat.plan.generation:
            if plan.kind == "planned" and self.member not in plan.joiners:
                self.world.seen["next plan reached a joiner before its own had formed"] += 1
            if plan.kind == "unplanned":
                self.world.seen["joiner survived a generation it had not seen formed"] += 1
        self.tell_seat(PlanArrived(plan=plan))

    def tell_seat(self, event: object) -> None:
        held = self.seat.plan.generation if self.seat.plan else 0
        instructions = self.seat.handle(event)  # type: ignore[arg-type]
        self._carry_out(instructions)
        generation = self.seat.plan.generation if self.seat.plan else 0
        if generation != held:
            self.world.tell(f"rank {self.member} adopts generation {generation} at step {self.seat.step}")
        self.advance()

    def _carry_out(self, instructions: tuple[SeatInstruction, ...]) -> None:
        for instruction in instructions:
            match instruction:
                case Form(plan=plan):
                    self._goes_back |= self.begun is not None and plan.base < self.begun.generation
                    self.world.group_of(plan).called_by(self)
                case Report():
                    self.telling.report()
                case Discard():
                    self.world.seen["partial sums discarded"] += 1
                    self.partial, self._stale = {}, self._busy and self.world.setting.pipeline
                case Leave():
                    self.world.seen["left"] += 1
                    self.world.kill_rank(self.member, "left, as the others went on without it")

    def receive_state(self, generation: int, complete: int, state: State) -> None:
        self.state, self.partial = dict(state), {}
        self.tell_seat(StateReceived(generation=generation, complete=complete))

    def begin_ahead(self, plan: Plan, complete: int) -> None:
        """Forward and backward have what they need of the layers of this planned change, which has not formed yet."""
        if self.seat.plan is None or self.seat.plan.generation != plan.generation or not self.seat.forming:
            return
        self.world.seen["begun before layers were complete"] += 1
        self.begun, self._goes_back = plan, False
        self.passing.seated(plan)
        self.tell_seat(MayBegin(generation=plan.generation, complete=complete))

    @property
    def has_empty_hands(self) -> bool:
        return not self._busy

    @property
    def parked(self) -> bool:
        """Whether the training thread keeps its hands off the state."""
        return self.ready and self.seat.restoring and not self._busy

    def load(self, generation: int, restore: Restore, state: State) -> None:
        """The snapshot's state takes the place of what was held here, if anything was."""
        self.loaded, self.kept, self.reduced = (generation, restore), None, None
        self.begun, self._goes_back = None, False
        self._back_in_first_loop = self._in_second_loop and restore.key.step <= self.world.second_loop
        self.passing.drop()
        branch = self.world.plans_on_record[generation].branch
        self.capturing.begin_anew(Ordinal(branch, restore.key.step))
        self.receive_state(generation, restore.key.step - 1, state)
        self.world.tell(f"rank {self.member} has loaded {restore.key}")
        self.world.emit("restored", rank=self, restore=restore)

    def formed(self, generation: int, complete: int) -> None:
        """The group of this generation exists, and this rank has what it lacked."""
        if self.seat.plan is None or self.seat.plan.generation != generation:
            return
        if self._goes_back and self._busy:
            self.later(0.02, lambda: self.formed(generation, complete))
            return
        if self.seat.complete < complete:
            assert self.received_result is not None and self.received_result[0] == generation
            self.kept = self.received_result[1]
            assert self.kept.step == complete, (self.kept, complete)
            self.world.seen["caught up from a kept result"] += 1
        self.world.newest_formed = max(self.world.newest_formed, generation)
        self.world.tell(f"rank {self.member} sees generation {generation} formed, step {complete} complete")
        self._settle(self.seat.plan)
        self.tell_seat(Formed(generation=generation, complete=complete))
        self.world.emit("formed", rank=self, generation=generation)
        self.world.faults.point("formed", [self.member])

    def _settle(self, plan: Plan) -> None:
        """Only this plan's layers are here from now on."""
        former, self.layers = self.layers, layers_of(plan, self.member, self.world.setting.layers)
        if former == self.layers and len(self.state) > len(former) + 1:
            self.world.seen["a change of layers was gone back on"] += 1
        self.state = {layer: self.state[layer] for layer in (NOBODYS, *self.layers)}
        if self._goes_back:
            self.world.seen["what was computed ahead was dropped"] += 1
            self.passing.drop()
        self.begun, self._goes_back = None, False
        if plan.stages:
            self.passing.seated(plan)

    def form_failed(self, generation: int) -> None:
        self.tell_seat(FormFailed(generation=generation))

    def stage_done(self, plan: Plan, step: int, sums: dict[int, int]) -> bool:
        """This rank has its stage's sums; what others know of the step it does not know yet."""
        if self.seat.plan is None or self.seat.plan.generation != plan.generation:
            return False
        if self.seat.broken == plan.generation:
            return False
        self.reduced = step, sums
        self.world.emit("stage_reduced", rank=self, plan=plan, step=step)
        self.world.faults.point("stage reduced", list(plan.members))
        return True

    def exchange_done(self, plan: Plan, agreed: int, result: Complete, lane: Agreed) -> None:
        generation, step = plan.generation, result.step
        if self.seat.plan is None or self.seat.plan.generation != generation:
            return
        if self.seat.broken == generation:
            return
        self.kept = result
        self.world.tell(f"rank {self.member} completes step {step} in generation {generation}, agreed {agreed}")
        if lane.capture:
            self.capturing.agree(plan, step + 1, lane)
        self.tell_seat(ExchangeDone(generation=generation, step=step, agreed=agreed))
        self.world.faults.point("completed", [self.member])

    def exchange_failed(self, generation: int, step: int) -> None:
        self.world.emit("exchange_failed", rank=self, generation=generation, step=step)
        self.world.tell(f"rank {self.member} sees its exchange of step {step} in generation {generation} fail")
        self.tell_seat(ExchangeFailed(generation=generation, step=step))

    # Training thread

    def _reach_loop(self) -> None:
        self.ready = True
        self.telling.ready()
        self.advance()

    def advance(self) -> None:
        if self._busy or not self.ready or self.seat.finished or self.seat.restoring:
            return
        if self.seat.formed == 0 and not self.seat.has_begun_ahead:
            return
        self._work += 1
        second = self.world.second_loop
        if self._back_in_first_loop:
            self.world.seen["gone back to a loop that was left"] += 1
            self.world.kill_rank(self.member, "cannot go back to a loop that it has left")
        elif self.seat.departed:
            self._come_to_rest()
        elif second and not self._in_second_loop and self.seat.step >= second:
            if self.seat.settled:
                self._end_first_loop()
        elif self.seat.step >= self.world.setting.steps:
            if not self.seat.settled:
                return
            self.tell_seat(Finished(step=self.seat.step))
            self._busy = True
            self.later(self.world.rng.uniform(0.0, 0.5), self._return)
            self.world.faults.point("finished", [self.member])
        else:
            self._go_on()

    def _go_on(self) -> None:
        match self.seat.next():
            case Compute() if self.world.setting.pipeline:
                action = self.passing.choose(self.seat.work - self.seat.folded)
                if action is not None:
                    self._compute(action.leaf, action)
            case Compute(leaf=leaf):
                self.pace.handed_out(self.world.now)
                self._compute(leaf)
            case Apply(step=step):
                self._busy = True
                self.later(self.world.rng.uniform(0.01, 0.1), lambda: self._apply(step))
                self.world.faults.point("applying", [self.member])
            case Reduce(plan=plan, step=step):
                if self._submitted != (plan.generation, step):
                    self._submitted = (plan.generation, step)
                    self.world.group_of(plan).submitted_by(self, step)

    def _compute(self, leaf: int, action: Action | None = None) -> None:
        """action: in a pipeline."""
        self._busy = True
        layers = self.layers if self.begun is None else layers_of(self.begun, self.member, self.world.setting.layers)
        step, values = self.seat.step, leaf_values(self.state, self.seat.step, leaf, layers)
        takes_s = self.world.rng.uniform(0.03, 0.15) * self.world.speeds.factor(self.node, self.world.now)
        self.later(takes_s, lambda: self._fold(step, leaf, values, action))

    def _fold(self, step: int, leaf: int, values: dict[int, int], action: Action | None) -> None:
        self._busy, stale, self._stale = False, self._stale, False
        self._work += 1
        self.pace.folded(self.world.now)
        if action is not None and (self.seat.restoring or not self.passing.done(action) or stale):
            self.advance()
            return
        self.partial[leaf] = values
        self.world.emit("folded", rank=self, step=step, leaf=leaf, layers=tuple(values))
        self.tell_seat(LeafFolded(step=step, leaf=leaf))

    def _apply(self, step: int) -> None:
        if self.capturing.copying:
            self.later(0.02, lambda: self._apply(step))
            return
        self._busy = False
        self._work += 1
        assert self.kept is not None and self.kept.step == step, (self.kept, step)
        result = self.kept
        assert set(result.sums) == set(self.layers), (result, self.layers)
        self.state, self.partial = next_state(self.state, result), {}
        self.passing.drop()
        self.world.seen["step committed"] += 1
        self.seat.handle(Applied(step=step))
        self.world.tell(f"rank {self.member} has applied step {step}")
        self.world.emit("applied", rank=self, result=result)
        self.capturing.boundary()
        if self.seat.awaited and self.seat.plan is not None:
            self.held = self.seat.plan.generation, dict(self.state)
            self.seat.handle(MayBegin(generation=self.seat.plan.generation, complete=self.seat.complete))
        if self.world.drains.active and self.capturing.protected_generation:
            told = SnapshotProtected(generation=self.capturing.protected_generation)
            self.world.to_controllers(self.node, lambda shell: shell.take(told))
        self.advance()

    def _come_to_rest(self) -> None:
        """The others go on without this rank: it applies the step, and its share of the last snapshot is whole."""
        match self.seat.next():
            case Apply():
                self._go_on()
            case _ if self.capturing.copying:
                self.later(0.05, self.advance)
            case _ if not self.seat.at_rest:
                self.tell_seat(Rested())

    def _end_first_loop(self) -> None:
        self.world.seen["passed a loop by" if self.seat.step > self.world.second_loop else "a loop after a loop"] += 1
        self.tell_seat(Finished(step=self.seat.step))
        self._busy = True
        self.later(self.world.rng.uniform(0.0, 0.5), self._begin_second_loop)
        self.world.faults.point("finished", [self.member])

    def _begin_second_loop(self) -> None:
        self._busy, self._in_second_loop = False, True
        self.tell_seat(GoesOn(step=self.seat.step))
        self.advance()

    def _return(self) -> None:
        self.returned = True
        self._busy = False
        self.world.emit("returned", rank=self)
        self.telling.returned()
