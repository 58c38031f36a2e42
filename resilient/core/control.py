"""The controller's mind: facts in, instructions out.

Theory of operation
    Facts update what is known (`membership`, `formed`, `current`); then `_settle` asks what should be
    true and instructs whatever is missing. Nothing depends on a message arriving once or in order:
    ranks repeat their reports, and a rank that reports an older generation is sent the newest again.

    Generations are made in `forming`; who is gone is killed and counted in `deaths`; what else follows has a file of
    its own, too: `starting`, `leaving`, `speeds`, `rollbacks`, `restoring`, `going_back`.

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

from . import ending
from .bubbles import Bubbles
from .chronicle import Chronicle
from .deaths import Deaths
from .events import (
    Event,
    GenerationCreated,
    GenerationTaken,
    ImagesDecoded,
    InventoryTaken,
    LinksProbed,
    NodeDrained,
    NodeGone,
    NodeLeaving,
    NodeSeen,
    NoNodeFits,
    RankCrashed,
    RankFailed,
    RankGone,
    RankLeaving,
    RankPending,
    RankReady,
    RankReported,
    RankReturned,
    Resumed,
    SnapshotProtected,
    StopAsked,
    StorageSeen,
    Tick,
)
from .failures import Failures
from .forming import Forming
from .going_back import GoingBack, Resume
from .instructions import End, Instruction, Say
from .leaving import Leaving
from .limits import Limits
from .membership import Membership
from .plan import Plan
from .recovery import decide
from .restoring import Restoring
from .rollbacks import Rollbacks
from .seat import Rollback
from .silent_links import SilentLinks
from .situation import Lost, Make, NeedNodes, Situation, Stay, broken, stands_still
from .speeds import Speeds
from .staging import Timings
from .standing import Member
from .starting import Starting
from .storage import Storage


@dataclass(slots=True, kw_only=True)
class Control:
    limits: Limits
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
    deaths: Deaths = field(init=False)
    forming: Forming = field(init=False)
    starting: Starting = field(init=False)
    restoring: Restoring = field(init=False)
    going_back: GoingBack = field(init=False)
    leaving: Leaving = field(init=False)
    speeds: Speeds = field(init=False)
    silent_links: SilentLinks = field(init=False)
    unheard: set[int] = field(default_factory=set)
    """Members that an earlier controller has told of, and that have not reported yet."""
    never_seated: set[int] = field(default_factory=set)
    """Those of them that are in no generation: nothing hangs on them, and they may wait for a place for long."""
    ended: bool = False
    now: float = 0.0
    waiting_for: str = ""
    """Why nodes are, or were last, waited for."""
    _out: list[Instruction] = field(default_factory=list)
    _since: dict[str, float] = field(default_factory=dict)
    _said: str = ""
    _unfit: str = ""
    """Why no node that is there can hold a rank."""
    _rollbacks: Rollbacks = field(init=False)

    def __post_init__(self) -> None:
        detection_s = self.limits.detection_s
        self.deaths = Deaths(control=self, failures=Failures(per_hour=self.limits.max_failures))
        self.forming, self.starting = Forming(control=self), Starting(control=self)
        self._rollbacks, self.silent_links = Rollbacks(control=self), SilentLinks(control=self)
        self.restoring = Restoring(ask_again_s=detection_s / 4, answer_limit_s=15 * detection_s)
        self.leaving, self.speeds = Leaving(control=self), Speeds(control=self)
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

    def _no_node_fits(self, event: NoNodeFits) -> None:
        self._unfit = event.why
        if event.hopeless:
            self.fail(event.why)

    def _rank_failed(self, event: RankFailed) -> None:
        member = self.membership.members.get(event.member)
        if member is None or member.gone:
            return
        rank = f"(member {event.member}, not yet seated)"
        rank = self.current.rank_in_words(event.member) if self.current is not None else rank
        self.fail(
            f"the training function raised on rank {rank} (node {member.node[:8]}) "
            f"in step {event.step}:\n{event.traceback}",
        )

    def _rank_returned(self, event: RankReturned) -> None:
        member = self.membership.members.get(event.member)
        if member is not None and not member.gone:
            member.part, member.returned_at, member.objects = event.part, event.step, event.objects
            member.verified = event.verified
            member.digest = event.digest if event.part is None else event.part.skeleton.hex()
            self.membership.changed(member)

    def _stop_asked(self, event: StopAsked) -> None:
        self.end("stopped", event.why)

    def _tick(self, event: Tick) -> None:
        pass

    # What follows

    def _settle(self) -> None:
        if self.creating is not None or self.unheard - self.never_seated:
            return
        self.deaths.kill_strays()
        self.leaving.release()
        if self._check_end():
            return
        self.speeds.look()
        rollback = self._rollbacks.wanted()
        if rollback is not None:
            self._go_back(rollback)
            return
        self.restoring.look_for(None)
        self.silent_links.look(still=self._stands_still(), broken=self._is_broken())
        if self.ended:
            return
        situation = self._situation()
        decision = decide(situation)
        lost_for_s = self.for_s("lost", isinstance(decision, Lost))
        match decision:
            case Make(plan=plan) if plan.kind == "initial" and self.going_back.looking_back:
                self.going_back.at_the_start(situation, plan)
            case Make(plan=plan):
                self.forming.make(plan)
            case NeedNodes(reason=reason):
                self.wait_for_nodes(reason)
            case Lost(reason=reason):
                self.going_back.after_loss(reason, situation, lost_for_s)
            case Stay(reason=reason, stuck=stuck):
                self._since.pop("waiting", None)
                self.leaving.stays(reason if stuck else "")
        if not self.ended:
            self.starting.spawn_missing()
            self._out += self.leaving.let_go()

    def _go_back(self, rollback: Rollback) -> None:
        if rollback.back_to < 0:
            self.fail(f"{rollback.why}, and there is no state from before that is known to be right")
            return
        self.chronicle.rolled_back(rollback)
        self.deaths.replace(rollback.suspects, rollback.why)
        self.restoring.look_for(rollback)
        if not self.ended:
            self.going_back.roll_back(rollback, self._situation())
        if not self.ended:
            self.starting.spawn_missing()

    def _inventory_taken(self, event: InventoryTaken) -> None:
        self._out += self.restoring.answered(event, self.now)

    def _storage_seen(self, event: StorageSeen) -> None:
        self.going_back.storage.seen(event, self.now)

    def _images_decoded(self, event: ImagesDecoded) -> None:
        self.restoring.decoded(event)

    def _stands_still(self) -> bool:
        return self.current is not None and stands_still(self.membership, self.formed, self.current)

    def _is_broken(self) -> bool:
        return self.current is not None and broken(self.membership, self.formed, self.current)

    def _situation(self) -> Situation:
        still = self._stands_still()
        enough = self.membership.everybody.count("ready") >= self.limits.min_workers
        return Situation(
            limits=self.limits,
            membership=self.membership,
            formed=self.formed,
            current=self.current,
            newest=self.newest,
            inherited=self.newest == self.forming.inherited,
            broken_for_s=self.for_s("broken", still or self._is_broken()),
            stands_still=still,
            waited_s=self.for_s("enough", enough),
            may_wait_s=self.leaving.may_wait_s(self.current),
            leaf_s=self.speeds.known,
            layer_s=self.timings.known,
            gain=self.speeds.gain,
            uneven=self.speeds.uneven,
        )

    def _check_end(self) -> bool:
        plan = self.formed or self.current  # of a planned generation that comes too late, joiners never finish
        if plan is None:
            return False
        end = ending.end_of(self.membership, plan, self.current or plan)
        if isinstance(end, ending.EndsDiffer):
            self._rollbacks.ends_differ(end, plan)
            return self.ended
        if end is not None:
            self.end(end.outcome, end.reason, digest=end.digest)
        return end is not None

    def wait_for_nodes(self, reason: str) -> None:
        waited_s = self.for_s("waiting", True)
        reason = f"{reason}; {self._unfit}" if self._unfit else reason
        self.waiting_for = reason
        if waited_s >= self.limits.wait_for_nodes_s:
            self.fail(
                f"{reason}, and after {self.limits.wait_for_nodes_s:.0f} s no node with room for more has come: "
                "add nodes, lower workers=(min, max), or allow more time with wait_for_nodes_s",
            )
        else:
            self.say(f"waiting for nodes: {reason}; gives up after {self.limits.wait_for_nodes_s:.0f} s")

    # Small things

    def new_member(self, number: int, node: str) -> Member:
        self.next_member = max(self.next_member, number + 1)
        return self.membership.new_member(number, node)

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
        self.end("failed", reason)

    def end(self, outcome: Any, reason: str, digest: str = "") -> None:
        self.ended = True
        self._out.append(End(outcome=outcome, reason=reason, digest=digest))


_TABLE: dict[type, Callable[[Control, Any], None]] = {
    NodeSeen: Control._node_seen,
    NoNodeFits: Control._no_node_fits,
    NodeGone: lambda control, event: control.deaths.node_gone(event),
    RankReady: lambda control, event: control.starting.rank_ready(event),
    RankReported: lambda control, event: control.forming.reported(event),
    LinksProbed: lambda control, event: control.silent_links.probed(event),
    NodeLeaving: lambda control, event: control.leaving.node_leaves(event),
    RankLeaving: lambda control, event: control.leaving.rank_leaves(event),
    SnapshotProtected: lambda control, event: control.leaving.snapshot_protected(event),
    NodeDrained: lambda control, event: control.leaving.node_drained(event),
    RankGone: lambda control, event: control.deaths.rank_gone(event),
    RankPending: lambda control, event: control.deaths.rank_pending(event),
    RankCrashed: lambda control, event: control.deaths.rank_crashed(event),
    RankFailed: Control._rank_failed,
    RankReturned: Control._rank_returned,
    GenerationCreated: lambda control, event: control.forming.created(event),
    GenerationTaken: lambda control, event: control.forming.taken(event),
    InventoryTaken: Control._inventory_taken,
    ImagesDecoded: Control._images_decoded,
    StorageSeen: Control._storage_seen,
    Resumed: lambda control, event: control.forming.resumed(event),
    StopAsked: Control._stop_asked,
    Tick: Control._tick,
}
