"""One rank: the real seat, and around it the training thread and the control thread as automata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from resilient.core.detector import Vital
from resilient.core.events import RankReady, RankReported, RankReturned, SnapshotProtected
from resilient.core.lane import Agreed
from resilient.core.pace import Pace
from resilient.core.plan import Address, Plan, Restore
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
    Held,
    LeafFolded,
    Leave,
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
from .truth import leaf_value, next_state, state_at_start

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
        self.state = state_at_start()
        self.partial: dict[int, int] = {}
        self.kept: tuple[int, int] | None = None
        """The complete result of a step, to be applied here and served to others."""
        self.received_result: tuple[int, int, int] | None = None
        """(generation, step, result), got while leveling: counts when the generation has formed."""
        self.held: tuple[int, int] | None = None
        """A generation, and the state at its first boundary, for joiners."""
        self.capturing = Capturing(self)
        self.loaded: tuple[int, Restore] | None = None
        """The generation for which this rank has last loaded a snapshot, and which."""
        self._busy = False
        self._waiting_room: list[Callable[[], None]] = []
        self._submitted: tuple[int, int] | None = None
        self._work = 0
        self._pace = Pace()

    def begin(self) -> None:
        self.world.tell(f"rank {self.member} starts on {self.node}")
        self.later(self.world.rng.uniform(0.05, 0.6), self._repeat_report)
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
                    self.world.group_of(plan).called_by(self)
                case Report():
                    self._report()
                case Discard():
                    self.world.seen["partial sums discarded"] += 1
                    self.partial = {}
                case Leave():
                    self.world.seen["left"] += 1
                    self.world.kill_rank(self.member, "left, as the others went on without it")

    def receive_state(self, generation: int, complete: int, state: int) -> None:
        self.state, self.partial = state, {}
        self.tell_seat(StateReceived(generation=generation, complete=complete))

    @property
    def parked(self) -> bool:
        """Whether the training thread keeps its hands off the state."""
        return self.ready and self.seat.restoring and not self._busy

    def load(self, generation: int, restore: Restore, state: int) -> None:
        """The snapshot's state takes the place of what was held here, if anything was."""
        self.loaded, self.kept = (generation, restore), None
        branch = self.world.plans_on_record[generation].branch
        self.capturing.verified = Ordinal(branch, restore.key.step)
        self.receive_state(generation, restore.key.step - 1, state)
        self.world.tell(f"rank {self.member} has loaded {restore.key}")
        self.world.emit("restored", rank=self, restore=restore)

    def formed(self, generation: int, complete: int) -> None:
        """The group of this generation exists, and this rank has what it lacked."""
        if self.seat.plan is None or self.seat.plan.generation != generation:
            return
        if self.seat.complete < complete:
            assert self.received_result is not None and self.received_result[:2] == (generation, complete)
            self.kept = self.received_result[1:]
            self.world.seen["caught up from a kept result"] += 1
        self.world.newest_formed = max(self.world.newest_formed, generation)
        self.world.tell(f"rank {self.member} sees generation {generation} formed, step {complete} complete")
        self.tell_seat(Formed(generation=generation, complete=complete))
        self.world.emit("formed", rank=self, generation=generation)
        self.world.faults.point("formed", [self.member])

    def form_failed(self, generation: int) -> None:
        self.tell_seat(FormFailed(generation=generation))

    def exchange_done(self, plan: Plan, step: int, agreed: int, result: int, lane: Agreed) -> None:
        generation = plan.generation
        if self.seat.plan is None or self.seat.plan.generation != generation:
            return
        if self.seat.broken == generation:
            return
        self.kept = (step, result)
        self.world.tell(f"rank {self.member} completes step {step} in generation {generation}, agreed {agreed}")
        if lane.capture:
            self.capturing.agree(plan, step + 1, lane)
        self.tell_seat(ExchangeDone(generation=generation, step=step, agreed=agreed))
        self.world.faults.point("completed", [self.member])

    def exchange_failed(self, generation: int, step: int) -> None:
        self.world.emit("exchange_failed", rank=self, generation=generation, step=step)
        self.world.tell(f"rank {self.member} sees its exchange of step {step} in generation {generation} fail")
        self.tell_seat(ExchangeFailed(generation=generation, step=step))

    def _report(self) -> None:
        measured_s = self._pace.leaf_s if self.world.speeds.active else 0.0
        report = RankReported(report=replace(self.seat.report(), leaf_s=measured_s))
        self.world.to_controllers(self.node, lambda shell: shell.take(report))

    def _repeat_report(self) -> None:
        self._report()
        self.world.drains.repeated(self)
        if self.ready:
            self._say_ready()
        if self.returned:
            self._say_returned()
        self.later(0.5, self._repeat_report)

    def _say_ready(self) -> None:
        ready = RankReady(
            member=self.member,
            node=self.node,
            address=Address(host=self.node, port=self.member),
            micro_batches=self.world.setting.micro_batches,
            steps=self.world.setting.steps,
            probe="equal",
            probe_fields="equal",
        )
        self.world.to_controllers(self.node, lambda shell: shell.take(ready))

    def _say_returned(self) -> None:
        event = RankReturned(member=self.member, step=self.seat.step, digest=str(self.state))
        self.world.to_controllers(self.node, lambda shell: shell.take(event))

    # Training thread

    def _reach_loop(self) -> None:
        self.ready = True
        self._say_ready()
        self.advance()

    def advance(self) -> None:
        if self._busy or not self.ready or self.seat.finished or self.seat.formed == 0 or self.seat.restoring:
            return
        self._work += 1
        if self.seat.departed:
            self._come_to_rest()
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
            case Compute(leaf=leaf):
                self._busy = True
                step, value = self.seat.step, leaf_value(self.state, self.seat.step, leaf)
                self._pace.handed_out(self.world.now)
                takes_s = self.world.rng.uniform(0.03, 0.15) * self.world.speeds.factor(self.node, self.world.now)
                self.later(takes_s, lambda: self._fold(step, leaf, value))
            case Apply(step=step):
                self._busy = True
                self.later(self.world.rng.uniform(0.01, 0.1), lambda: self._apply(step))
                self.world.faults.point("applying", [self.member])
            case Reduce(plan=plan, step=step):
                if self._submitted != (plan.generation, step):
                    self._submitted = (plan.generation, step)
                    self.world.group_of(plan).submitted_by(self, step)

    def _fold(self, step: int, leaf: int, value: int) -> None:
        self._busy = False
        self._work += 1
        self._pace.folded(self.world.now)
        self.partial[leaf] = value
        self.world.emit("folded", rank=self, step=step, leaf=leaf)
        self.tell_seat(LeafFolded(step=step, leaf=leaf))

    def _apply(self, step: int) -> None:
        if self.capturing.copying:
            self.later(0.02, lambda: self._apply(step))
            return
        self._busy = False
        self._work += 1
        assert self.kept is not None and self.kept[0] == step, (self.kept, step)
        result = self.kept[1]
        self.state = next_state(self.state, step, result)
        self.partial = {}
        self.world.seen["step committed"] += 1
        self.seat.handle(Applied(step=step))
        self.world.tell(f"rank {self.member} has applied step {step}")
        self.world.emit("applied", rank=self, step=step, result=result)
        self.capturing.boundary()
        if self.seat.awaited and self.seat.plan is not None:
            self.held = self.seat.plan.generation, self.state
            self.seat.handle(Held(generation=self.seat.plan.generation))
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

    def _return(self) -> None:
        self.returned = True
        self._busy = False
        self.world.emit("returned", rank=self)
        self._say_returned()
