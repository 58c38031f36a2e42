"""The controller's mind: facts in, instructions out.

Theory of operation
    Facts update what is known (`membership`, `formed`, `current`); then `_settle` asks what should be
    true and instructs whatever is missing. Nothing depends on a message arriving once or in order:
    ranks repeat their reports, and a rank that reports an older generation is sent the newest again.

    A generation lives through: decided -> key created (CreateGeneration / GenerationCreated) -> sent
    to its members -> formed, as soon as one member reports so. Only one is under way at a time. A
    formation that fails is followed by a new number, never by the old one.

Invariants
    * Numbers of generations and of members only grow, and are never used twice.
    * An unplanned generation has only members of the last one known to have formed.
    * What was declared gone is killed, and stays gone whatever it reports later.
    * After End nothing more is instructed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from snapshot.core.branches import Lineage

from . import ending, recovery
from .bubbles import Bubbles
from .chronicle import Chronicle
from .events import (
    Event,
    GenerationCreated,
    GenerationTaken,
    ImagesDecoded,
    InventoryTaken,
    NodeDrained,
    NodeGone,
    NodeLeaving,
    NodeSeen,
    RankCrashed,
    RankFailed,
    RankGone,
    RankLeaving,
    RankReady,
    RankReported,
    RankReturned,
    Resumed,
    SnapshotProtected,
    StopAsked,
    StorageSeen,
    Tick,
)
from .failures import Crash, Failures
from .going_back import GoingBack, Resume
from .instructions import CreateGeneration, End, Instruction, Kill, Say, SendPlan
from .leaving import Leaving
from .membership import Membership
from .plan import Plan
from .restoring import Restoring
from .seat import Rollback
from .speeds import Speeds
from .staging import Timings
from .standing import Member
from .starting import Starting
from .storage import Storage


@dataclass(slots=True, kw_only=True)
class Control:
    limits: recovery.Limits
    allow_different_bits: bool = False
    attempt: int = 1
    resume: Resume = "auto"
    membership: Membership = field(default_factory=Membership)
    plans: dict[int, Plan] = field(default_factory=dict)
    """Generations whose key exists, from the last formed one on."""
    formed: Plan | None = None
    current: Plan | None = None
    creating: Plan | None = None
    next_member: int = 1
    newest: int = 0
    chronicle: Chronicle = field(default_factory=Chronicle)
    timings: Timings = field(default_factory=Timings)
    bubbles: Bubbles = field(default_factory=Bubbles)
    failures: Failures = field(init=False)
    restoring: Restoring = field(init=False)
    going_back: GoingBack = field(init=False)
    leaving: Leaving = field(init=False)
    speeds: Speeds = field(init=False)
    ended: bool = False
    now: float = 0.0
    _out: list[Instruction] = field(default_factory=list)
    _unheard: set[int] = field(default_factory=set)
    _since: dict[str, float] = field(default_factory=dict)
    _dealt_again: int = 0
    """Micro-batches of members that the generation which is being created goes on without."""
    _said: str = ""
    _starting: Starting = field(init=False)
    _asked_back: tuple[int, Rollback | None] = (0, None)
    """A branch, and what was asked for last by ranks that were on it."""
    _inherited: int = 0
    """The newest generation that an earlier controller has made."""

    def __post_init__(self) -> None:
        detection_s = self.limits.detection_s
        self.failures = Failures(per_hour=self.limits.max_failures)
        self.restoring = Restoring(ask_again_s=detection_s / 4, answer_limit_s=15 * detection_s)
        self.leaving, self.speeds, self._starting = Leaving(control=self), Speeds(control=self), Starting(control=self)
        earlier = self.limits.snapshots and self.attempt > 1
        self.going_back = GoingBack(
            control=self,
            resume=self.resume,
            storage=Storage(attempt=self.attempt),
            looking_back=self.resume != "never" and (earlier or self.limits.checkpoints),
        )

    def handle(self, event: Event, now: float) -> tuple[Instruction, ...]:
        """Take in one fact at time `now` (seconds, any origin, never backwards)."""
        assert now >= self.now, (now, self.now)
        if self.ended:
            return ()
        self.now, self._out = now, []
        _TABLE[type(event)](self, event)
        if not self.ended:
            self._settle()
        self.chronicle.figures.spent.look(now, waits=self.waits)
        return tuple(self._out)

    # Facts

    def _node_seen(self, event: NodeSeen) -> None:
        if event.node not in self.membership.nodes:
            self.going_back.changed()
        self.membership.node_seen(event.node, event.capacity)
        self.leaving.node_seen(event.node)

    def _node_gone(self, event: NodeGone) -> None:
        self.membership.node_gone(event.node)
        self.going_back.changed()
        self._count_failure(self.membership.on_node(event.node), f"node {event.node[:8]}: {event.why}")
        for member in self.membership.on_node(event.node):
            self._declare_gone(member, f"node {event.node[:8]}: {event.why}", event.silent_s, node_lost=True)
        self._starting.node_gone(event.node)
        self.leaving.node_gone(event.node)

    def _rank_ready(self, event: RankReady) -> None:
        member = self.new_member(event.member, event.node)
        if member.gone:
            return
        self._starting.reached_loop()
        first = self.membership.first_ready() or event
        member.ready = event
        self.membership.changed(member)
        if (event.micro_batches, event.steps) != (first.micro_batches, first.steps):
            self._end(
                "failed",
                f"ranks disagree about their loop: {event.micro_batches} micro-batches and {event.steps} steps in "
                f"one, {first.micro_batches} and {first.steps} in another; every rank must run the same script",
            )
        elif event.probe != first.probe:
            self._different_bits(event, first)

    def _different_bits(self, event: RankReady, first: RankReady) -> None:
        what = (
            f"node {event.node[:8]} computes other bits than node {first.node[:8]}: {event.probe_fields} "
            f"against {first.probe_fields}"
        )
        if self.allow_different_bits:
            self.say(f"warning: {what}; the result may differ in its last bits")
        else:
            self._end("failed", f"{what}; use equal machines, or allow it with allow_different_bits=True")

    def _rank_reported(self, event: RankReported) -> None:
        report = event.report
        member = self.membership.members.get(report.member)
        if member is None or member.gone:
            return
        self._unheard.discard(report.member)
        if report.generation > self.newest:
            self._end("superseded", f"generation {report.generation} was created by another controller")
            return
        if member.report is not None and report.serial < member.report.serial:
            return
        member.report = report
        self.timings.take(report.member, report.layer_s)
        self.bubbles.take(report.member, report.bubbles)
        self.membership.changed(member)
        if report.formed and report.formed in self.plans and self._counts_as_formed(report.member, report.formed):
            self._rule(formed=self.plans[report.formed], current=self.current)
            self.going_back.formed()
            self._forget_older_plans()
            self.chronicle.formed(report.formed, report.complete, self.now)
        self.chronicle.committed(report.formed, report.complete, self.now)
        self._send_again(member)

    def _counts_as_formed(self, number: int, generation: int) -> bool:
        """A report of a superseded generation counts only from those who matter now."""
        if self.formed is not None and generation <= self.formed.generation:
            return False
        if self.current is None or generation == self.current.generation or number in self.current.ranks:
            return True
        return self.formed is not None and self.membership.tally(self.formed).count("gone") == self.formed.size

    def _rank_gone(self, event: RankGone) -> None:
        member = self.membership.members.get(event.member)
        if member is not None and not member.gone:
            self._count_failure([member], f"a rank on node {member.node[:8]}: {event.why}")
            self._declare_gone(member, event.why, event.silent_s, node_lost=False)

    def _count_failure(self, lost: list[Member], why: str) -> None:
        """Not what had died before this controller came, of which it has not heard; nor what was leaving anyway."""
        if all(member.number in self._unheard or member.leaving for member in lost):
            return
        if (reason := self.failures.lost(self.now)) is not None:
            self._end("failed", f"{reason}; the last one: {why}")

    def _rank_crashed(self, event: RankCrashed) -> None:
        member = self.membership.members.get(event.member)
        if member is None or member.gone:
            return
        reason = self.failures.crashed(event.step, Crash(member.number, member.node, event.traceback))
        if reason is not None:
            self._end("failed", reason)
            return
        error = event.traceback.rstrip().rpartition("\n")[2]
        self._rank_gone(RankGone(member=event.member, why=f"machine error in step {event.step}: {error}"))

    def _declare_gone(self, member: Member, why: str, silent_s: float, *, node_lost: bool) -> None:
        seat = self._seat_of(member)
        member.gone = True
        self.timings.forget([member.number])
        self.membership.changed(member)
        self._unheard.discard(member.number)
        self._starting.died(member)
        self._out.append(Kill(member=member.number, node=member.node, reason=why))
        if seat is not None:
            self.chronicle.lost(seat, member.node, why, silent_s, self.now, node_lost=node_lost)

    def _seat_of(self, member: Member) -> int | None:
        """The rank of a member that is still needed."""
        if self.current is None or member.number in self.current.ranks:
            return None if self.current is None else self.current.ranks[member.number]
        if self.formed is None or self._unheard or not recovery.needs_base(self.membership, self.formed, self.current):
            return None
        return self.formed.ranks.get(member.number)

    def _rank_failed(self, event: RankFailed) -> None:
        member = self.membership.members.get(event.member)
        if member is None or member.gone:
            return
        rank = f"(member {event.member}, not yet seated)"
        rank = self.current.rank_in_words(event.member) if self.current is not None else rank
        self._end(
            "failed",
            f"the training function raised on rank {rank} (node {member.node[:8]}) "
            f"in step {event.step}:\n{event.traceback}",
        )

    def _rank_returned(self, event: RankReturned) -> None:
        member = self.membership.members.get(event.member)
        if member is not None and not member.gone:
            member.part = event.part
            member.digest = event.digest if event.part is None else event.part.skeleton.hex()
            self.membership.changed(member)

    def _generation_created(self, event: GenerationCreated) -> None:
        if self.creating is None or event.generation != self.creating.generation:
            return
        created, self.creating = self.creating, None
        self.plans[event.generation] = created
        self._rule(formed=self.formed, current=created)
        self.restoring.lineage = Lineage(branches=created.branches)
        self._since.pop("broken", None)
        left_out = self._left_out()
        self.chronicle.created(created, self.now, drained=bool(left_out), dealt_again=self._dealt_again)
        for number in (*created.members, *sorted(left_out)):
            self._send(self.membership.members[number])

    def _left_out(self) -> set[int]:
        """Members of the last formed generation whom a planned one goes on without: it is reached only with them."""
        if self.formed is None or self.current is None or self.current.kind != "planned":
            return set()
        return self.formed.ranks.keys() - self.current.ranks.keys()

    def _generation_taken(self, event: GenerationTaken) -> None:
        if self.creating is not None and event.generation == self.creating.generation:
            self._end("superseded", f"generation {event.generation} was created by another controller")

    def _resumed(self, event: Resumed) -> None:
        assert self.newest == 0 and not self.membership.members, "resumed twice"
        for number, node in event.spawned:
            self.new_member(number, node)
        self.plans = {plan.generation: plan for plan in event.plans}
        for place in (place for plan in event.plans for place in plan.places):
            self.new_member(place.member, place.node)
        if event.plans:
            current = event.plans[-1]
            self.newest = self._inherited = current.generation
            self.restoring.lineage = Lineage(branches=current.branches)
            self.going_back.resumed(event.plans)
            self.chronicle.resumed(event.plans)
            self._rule(formed=self.plans.get(current.base), current=current)  # plans come only from what has formed
        for number in set(event.gone) - set(event.plans[-1].members if event.plans else ()):
            # Those of the newest generation are news: nobody has made one without them yet.
            self.membership.members[number].gone = True
            self.membership.changed(self.membership.members[number])
        self._unheard = {member.number for member in self.membership.alive()}

    def _rule(self, *, formed: Plan | None, current: Plan | None) -> None:
        self.formed, self.current = formed, current
        self.membership.keep(formed, current)

    def _stop_asked(self, event: StopAsked) -> None:
        self._end("stopped", event.why)

    def _tick(self, event: Tick) -> None:
        pass

    # What follows

    def _settle(self) -> None:
        if self.creating is not None or self._unheard:
            return
        self._kill_orphans()
        self.leaving.release()
        if self._check_end():
            return
        self.speeds.look()
        rollback = self._rollback_wanted()
        if rollback is not None:
            self._go_back(rollback)
            return
        self.restoring.look_for(None)
        situation = self._situation()
        decision = recovery.decide(situation)
        lost_for_s = self.for_s("lost", isinstance(decision, recovery.Lost))
        match decision:
            case recovery.Make(plan=plan) if plan.kind == "initial" and self.going_back.looking_back:
                self.going_back.at_the_start(situation, plan)
            case recovery.Make(plan=plan):
                self.make(plan)
            case recovery.NeedNodes(reason=reason):
                self.wait_for_nodes(reason)
            case recovery.Lost(reason=reason):
                self.going_back.after_loss(reason, situation, lost_for_s)
            case recovery.Stay(reason=reason, stuck=stuck):
                self._since.pop("waiting", None)
                self.leaving.stays(reason if stuck else "")
        if not self.ended:
            self._starting.spawn_missing()
            self._out += self.leaving.let_go()

    def make(self, plan: Plan) -> None:
        self.creating, self.newest = plan, plan.generation
        lost = (
            set() if plan.kind != "unplanned" or self.formed is None else self.formed.ranks.keys() - plan.ranks.keys()
        )
        self._dealt_again = sum(len(self.formed.leaves_of(member)) for member in lost) if self.formed else 0
        self._since.pop("waiting", None)
        self._out.append(CreateGeneration(plan=plan))

    def _rollback_wanted(self) -> Rollback | None:
        """What seated ranks ask for, or have asked for on this branch. They all do, but one is enough, also if it dies
        then: the others may not have learned of it."""
        if self.formed is None or self.current is None:
            return None
        if asks := self._asks_to_go_back(self.formed):
            self._asked_back = self.formed.branch, max(asks, key=_known_by)
        # A planned change is reached only over an exchange, which whoever wants to go back does not take part in.
        if self.formed is not self.current and self.current.kind != "planned":
            return None
        branch, asked = self._asked_back
        return asked if branch == self.formed.branch else None

    def _asks_to_go_back(self, formed: Plan) -> list[Rollback]:
        """Of those who have done what was asked for before, some may not have told so yet."""
        numbers = self.membership.tally(formed).numbers("rollback")
        reports = (self.membership.members[number].report for number in sorted(numbers))
        return [
            report.rollback
            for report in reports
            if report is not None and report.rollback is not None and report.generation >= formed.since
        ]

    def _go_back(self, rollback: Rollback) -> None:
        if rollback.back_to < 0:
            self.fail(f"{rollback.why}, and there is no state from before that is known to be right")
            return
        self.chronicle.rolled_back(rollback)
        self._replace(rollback.suspects, rollback.why)
        self.restoring.look_for(rollback)
        if not self.ended:
            self.going_back.roll_back(rollback, self._situation())
        if not self.ended:
            self._starting.spawn_missing()

    def _replace(self, suspects: tuple[int, ...], why: str) -> None:
        for number in suspects:
            member = self.membership.members[number]
            if not member.gone:
                self._count_failure([member], why)
                self.membership.avoid(member.node)
                self._declare_gone(member, why, 0.0, node_lost=False)

    def _inventory_taken(self, event: InventoryTaken) -> None:
        self._out += self.restoring.answered(event, self.now)

    def _storage_seen(self, event: StorageSeen) -> None:
        self.going_back.storage.seen(event, self.now)

    def _images_decoded(self, event: ImagesDecoded) -> None:
        self.restoring.decoded(event)

    def _situation(self) -> recovery.Situation:
        broken = self.current is not None and recovery.broken(self.membership, self.formed, self.current)
        enough = self.membership.everybody.count("ready") >= self.limits.min_workers
        return recovery.Situation(
            limits=self.limits,
            membership=self.membership,
            formed=self.formed,
            current=self.current,
            newest=self.newest,
            inherited=self.newest == self._inherited,
            broken_for_s=self.for_s("broken", broken),
            waited_s=self.for_s("enough", enough),
            may_wait_s=self.leaving.may_wait_s(self.current),
            leaf_s=self.speeds.known,
            layer_s=self.timings.known,
            gain=self.speeds.gain,
            uneven=self.speeds.uneven,
        )

    def _kill_orphans(self) -> None:
        """Ranks that hold state of a generation that the others went on without."""
        if self.formed is None or self.current is None or self.formed.generation != self.current.generation:
            return
        for member in self.membership.strays(self.current):
            member.gone = True
            self.membership.changed(member)
            reason = f"left out of generation {self.current.generation}"
            self._out.append(Kill(member=member.number, node=member.node, reason=reason))

    def _check_end(self) -> bool:
        plan = self.formed or self.current  # of a planned generation that comes too late, joiners never finish
        end = None if plan is None else ending.end_of(self.membership, plan, self.current or plan)
        if end is not None:
            self._end(end.outcome, end.reason, digest=end.digest)
        return end is not None

    def wait_for_nodes(self, reason: str) -> None:
        waited_s = self.for_s("waiting", True)
        if waited_s >= self.limits.wait_for_nodes_s:
            self._end(
                "failed",
                f"{reason}, and after {self.limits.wait_for_nodes_s:.0f} s no node with room for more has come: "
                "add nodes, lower workers=(min, max), or allow more time with wait_for_nodes_s",
            )
        else:
            self.say(f"waiting for nodes: {reason}; gives up after {self.limits.wait_for_nodes_s:.0f} s")

    # Small things

    def new_member(self, number: int, node: str) -> Member:
        self.next_member = max(self.next_member, number + 1)
        return self.membership.new_member(number, node)

    def _send(self, member: Member) -> None:
        assert self.current is not None
        if not member.gone:
            member.plan_sent_at = self.now
            self._out.append(SendPlan(member=member.number, plan=self.current))

    def _send_again(self, member: Member) -> None:
        if self.current is None or member.report is None:
            return
        if member.number not in self.current.ranks and member.number not in self._left_out():
            return
        behind = member.report.generation < self.current.generation
        if behind and self.now - member.plan_sent_at >= self.limits.resend_s:
            self._send(member)

    def _forget_older_plans(self) -> None:
        assert self.formed is not None
        oldest = self.formed.generation
        self.plans = {number: plan for number, plan in self.plans.items() if number >= oldest}

    def for_s(self, what: str, holds: bool) -> float:
        """For how long a condition has held, in seconds."""
        if not holds:
            self._since.pop(what, None)
            return 0.0
        return self.now - self._since.setdefault(what, self.now)

    @property
    def waits(self) -> bool:
        """For nodes: there are too few ranks, and none that is starting."""
        return "waiting" in self._since and not self.membership.everybody.values("starting")

    @property
    def waiting_s(self) -> float:
        """For how long nodes have been waited for; 0 if they are not."""
        return self.now - self._since["waiting"] if self.waits else 0.0

    def say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._out.append(Say(text=text))

    def instruct(self, instructions: tuple[Instruction, ...]) -> None:
        self._out += instructions

    def fail(self, reason: str) -> None:
        self._end("failed", reason)

    def _end(self, outcome: Any, reason: str, digest: str = "") -> None:
        self.ended = True
        self._out.append(End(outcome=outcome, reason=reason, digest=digest))


def _known_by(rollback: Rollback) -> tuple[bool, int, str]:
    """Of those that ranks ask for after the same, the one by whoever has learned most is the greatest."""
    return bool(rollback.suspects), rollback.back_to, rollback.why


_TABLE: dict[type, Callable[[Control, Any], None]] = {
    NodeSeen: Control._node_seen,
    NodeGone: Control._node_gone,
    RankReady: Control._rank_ready,
    RankReported: Control._rank_reported,
    NodeLeaving: lambda control, event: control.leaving.node_leaves(event),
    RankLeaving: lambda control, event: control.leaving.rank_leaves(event),
    SnapshotProtected: lambda control, event: control.leaving.snapshot_protected(event),
    NodeDrained: lambda control, event: control.leaving.node_drained(event),
    RankGone: Control._rank_gone,
    RankCrashed: Control._rank_crashed,
    RankFailed: Control._rank_failed,
    RankReturned: Control._rank_returned,
    GenerationCreated: Control._generation_created,
    GenerationTaken: Control._generation_taken,
    InventoryTaken: Control._inventory_taken,
    ImagesDecoded: Control._images_decoded,
    StorageSeen: Control._storage_seen,
    Resumed: Control._resumed,
    StopAsked: Control._stop_asked,
    Tick: Control._tick,
}
