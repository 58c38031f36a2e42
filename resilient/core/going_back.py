"""The ways back to a state that no live rank holds, cheapest first; each choice says why.

    lost                 memory, parity; what no keeper can give any more, from storage
    submitted again      whatever is newest of what an earlier attempt has left in memory and on storage
    a rollback           the newest of memory, else of storage, that is old enough

What can't be had is waited for as long as that may help (keepers that are being replaced, storage that can't be
reached), and then the run ends and says what is missing. It never begins from scratch without being told to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from snapshot.core.branches import Lineage
from snapshot.core.election import Elected
from snapshot.core.inventory import CheckpointFound, SnapshotKey

from . import dealing
from .plan import Plan, Restore
from .restoring import Restoring
from .seat import Rollback
from .situation import Make, NeedNodes, Situation
from .storage import Storage

if TYPE_CHECKING:
    from .control import Control

Resume = Literal["auto", "never"] | int
MOST_ROLLBACKS = 3
"""So often a run goes back to the same state and leaves nothing out: what is computed again comes out the same."""
STORAGE_PATIENCE_DETECTIONS = 30
"""How long storage may fail to answer before the run ends for it."""


@dataclass(slots=True, kw_only=True)
class GoingBack:
    control: Control = field(repr=False, compare=False)
    resume: Resume = "auto"
    storage: Storage
    looking_back: bool = False
    """Whether the first generation may have something to go on from."""
    lineage_known: bool = False
    """Whether the branches of earlier attempts are known from elsewhere than from a checkpoint."""

    _gone_back: tuple[int, int] = (-1, 0)
    """The state that was to be gone back to last, leaving nothing out, and how often in a row."""

    _failed: int = 0
    """The last generation that was to be restored, and could not be."""

    def __post_init__(self) -> None:
        if self.resume != "auto":
            self.restoring.not_before = self.storage.attempt

    @property
    def restoring(self) -> Restoring:
        return self.control.restoring

    def resumed(self, plans: tuple[Plan, ...]) -> None:
        """A controller that came back: what the attempt began from is in its plans."""
        self.lineage_known = bool(plans)
        self.storage.own_only = self.resume != "auto"
        for plan in plans:
            if plan.restore is not None and plan.restore.folder and plan.base == 0:
                self.storage.first = plan.restore.folder

    def formed(self) -> None:
        """Whatever was restored could be."""
        self.storage.restored()

    def changed(self) -> None:
        """A node has come or gone, or there is something new to look for."""
        self.restoring.again()
        self.storage.again()

    # No live rank holds the state

    def after_loss(self, reason: str, situation: Situation, lost_for_s: float) -> None:
        control, limits = self.control, self.control.limits
        self._count_failure()
        if not limits.snapshots:
            if lost_for_s >= limits.detection_s:
                control.fail(f"{reason}: start again from the beginning, or from a checkpoint of your own")
            return
        ended = tuple(member.number for member in control.membership.members.values() if member.gone)
        control.instruct(self.restoring.ask(ended, control.now))
        if (found := self._newer_on_storage()) is not None:
            self._begin_from(found, self._line_to_go_on(found.key.step), reason, situation)
        elif self._memory_has_none(lost_for_s):
            assert self.restoring.none is not None
            self._from_storage(f"{reason}, and {self.restoring.none.reason}", situation)
        else:
            self._from_memory(reason, situation)

    def _count_failure(self) -> None:
        """Of the generation that was to be restored last, if it could not be: once."""
        current, formed = self.control.current, self.control.formed
        if current is None or current.restore is None or current is formed or current.generation == self._failed:
            return
        self._failed = current.generation
        died = self.control.membership.tally(current).count("gone") > 0
        (self.storage.deaths if died else self.storage.unread)[current.restore.folder] += 1

    def _memory_has_none(self, for_s: float) -> bool:
        """For certain: everybody who could have something has answered, or has had his time."""
        none = None if self.restoring.waiting else self.restoring.none
        return none is not None and for_s >= self.control.limits.lost_limit_s(bool(self.restoring.absent))

    def _newer_on_storage(self) -> CheckpointFound | None:
        """Memory has a snapshot, but perhaps not the newest that it had: a checkpoint may be newer."""
        elected = self.restoring.elected
        if elected is None or not self._may_be_outdone(elected):
            return None
        self.control.instruct(self.storage.look(self.control.now))
        found = self.storage.newest(self.restoring.line_to_look_on())
        memory = (elected.key.branch, elected.key.step)
        return found if found is not None and (found.key.branch, found.key.step) > memory else None

    def _may_be_outdone(self, elected: Elected) -> bool:
        """Of a newer one nothing can be read, or nobody is left who could have one of the generation formed last:
        keepers of older ones keep theirs, and know of no other."""
        control, key = self.control, elected.key
        formed = 0 if control.formed is None else control.formed.generation
        older = (key.attempt, key.generation) < (control.attempt, formed)
        return control.limits.checkpoints and (older or bool(elected.passed_over))

    def _storage_may_have_newer(self) -> bool:
        """Whether it has not answered yet, and may still do so soon: memory can be gone on from now."""
        elected, control = self.restoring.elected, self.control
        outdone = elected is not None and self._may_be_outdone(elected)
        soon = not self.storage.error and self.storage.silent_for_s(control.now) < control.limits.detection_s
        return outdone and self.storage.checkpoints is None and soon

    def _from_memory(self, reason: str, situation: Situation) -> None:
        if self.restoring.elected is not None and not self._storage_may_have_newer():
            why = f"{reason}; {self.restoring.elected.reason}"
            restore = self.restoring.restore()
            self._begin(restore, self._line_to_go_on(restore.key.step), why, situation)

    def _from_storage(self, reason: str, situation: Situation) -> None:
        control = self.control
        if not control.limits.checkpoints:
            control.fail(f"{reason}: start again from a checkpoint, or from the beginning")
            return
        if not self._storage_answers(reason):
            return
        found = self.storage.newest(self.restoring.line_to_look_on())
        if found is None:
            control.fail(f"{reason}, and there is no checkpoint of it on storage: start again from the beginning")
        else:
            self._begin_from(found, self._line_to_go_on(found.key.step), reason, situation)

    def _storage_answers(self, reason: str) -> bool:
        control = self.control
        control.instruct(self.storage.look(control.now))
        if self.storage.failing_for_s(control.now) > STORAGE_PATIENCE_DETECTIONS * control.limits.detection_s:
            control.fail(
                f"{reason}, and the checkpoints can't be listed: {self.storage.error}: see that the storage can be "
                "reached from the cluster's head node and start again"
            )
        return self.storage.checkpoints is not None

    def _begin_from(self, found: CheckpointFound, line: Lineage, reason: str, situation: Situation) -> None:
        restore = Restore(key=found.key, folder=found.folder)
        self._begin(restore, line, f"{reason}; the checkpoint of {found.key} is on storage", situation)

    def _begin(self, restore: Restore, line: Lineage, why: str, situation: Situation) -> None:
        control = self.control
        choose = dealing.restored if self.restoring.rollback is None else dealing.rolled_back
        if self._a_stage_is_lost():
            choose = dealing.rolled_back
        match choose(situation, restore, line, why):
            case Make(plan=plan):
                if not self._in_vain(self.restoring.rollback):
                    self._make(plan)
            case NeedNodes(reason=need):
                control.wait_for_nodes(need)

    def _line_to_go_on(self, step: int) -> Lineage:
        """A new one if ranks live on that have gone further on this one, and captured what they came to."""
        if self.restoring.rollback is None and self._a_stage_is_lost():
            return self.restoring.opened(step)
        return self.restoring.line_to_go_on(step)

    def _a_stage_is_lost(self) -> bool:
        """Whether ranks are seated that live, though the state is lost: that of a stage of a pipeline."""
        formed, membership = self.control.formed, self.control.membership
        return formed is not None and bool(formed.stages) and membership.tally(formed).count("gone") < formed.size

    def _in_vain(self, rollback: Rollback | None) -> bool:
        """Whether this has been tried too often: it would come again for ever."""
        if rollback is None or rollback.skip_to >= (rollback.skip_from or 0):
            return False
        back_to, times = self._gone_back
        self._gone_back = rollback.back_to, times + 1 if rollback.back_to == back_to else 1
        if self._gone_back[1] > MOST_ROLLBACKS:
            self.control.fail(
                f"{rollback.why}; it came again each of the {MOST_ROLLBACKS} times that the run went back for it: look "
                "for what ranks compute differently, such as times, host names or ranks in run.state"
            )
        return self.control.ended

    # The first generation of a run that was submitted before

    def at_the_start(self, situation: Situation, plan: Plan) -> None:
        control = self.control
        if control.limits.checkpoints and not self._storage_answers("the run begins"):
            return
        if isinstance(self.resume, int):
            self._from_step(self.resume, situation)
            return
        found = self.storage.newest(self.restoring.lineage if self.lineage_known else None)
        control.instruct(self.restoring.ask((), control.now))
        none = None if self.restoring.waiting else self.restoring.none
        looked_for_s = control.for_s("looking back", self.restoring.none is not None)
        absent = bool(self.restoring.absent) and looked_for_s < control.limits.lost_limit_s(True)
        elected = self.restoring.elected
        if elected is not None and (found is None or not _is_newer(found.key, elected.key)):
            self._from_memory("the run was submitted again", situation)
        elif elected is None and (none is None or absent):
            return
        elif found is not None:
            self._go_on_from(found, "the run was submitted again", situation)
        elif none is not None and none.passed_over:
            control.fail(
                f"an earlier attempt of this run has left snapshots, but {none.reason}: choose another name to begin "
                "anew, or wait until they have been swept",
            )
        else:
            where = "" if not control.limits.checkpoints else " or checkpoints"
            control.say(f"there are no snapshots{where} of this run yet: it begins at step 0")
            self._make(plan)

    def _make(self, plan: Plan) -> None:
        self.changed()
        self.looking_back, self.lineage_known = False, True
        self.storage.own_only = self.resume != "auto"
        self.control.forming.make(plan)

    def _from_step(self, step: int, situation: Situation) -> None:
        """Later steps than this one are given up: what begins here is a new branch."""
        found = self.storage.newest(None, step)
        if found is None:
            steps = sorted({checkpoint.key.step for checkpoint in self.storage.checkpoints or ()})
            self.control.fail(
                f"resume={step}: there is no complete checkpoint of step {step} on storage; there are those of "
                f"steps {', '.join(map(str, steps)) or '(none)'}"
            )
            return
        self.storage.first = found.folder
        self.restoring.lineage = found.lineage
        self._begin_from(found, self.restoring.opened(step), f"resume={step}", situation)

    def _go_on_from(self, found: CheckpointFound, reason: str, situation: Situation) -> None:
        self.storage.first = found.folder
        line = self.restoring.lineage if self.lineage_known else found.lineage
        self._begin_from(found, line, reason, situation)

    # Going back on purpose

    def roll_back(self, rollback: Rollback, situation: Situation) -> None:
        control = self.control
        if not control.limits.snapshots:
            control.fail(f"{rollback.why}, but there are no snapshots to go back to: ask for them with snapshot=")
            return
        control.instruct(self.restoring.ask((), control.now))
        looked_for_s = control.for_s("rolling back", self.restoring.none is not None)
        if (found := self._newer_on_storage()) is not None:
            self._begin_from(found, self.restoring.line_to_go_on(found.key.step), rollback.why, situation)
        elif self._memory_has_none(looked_for_s):
            assert self.restoring.none is not None
            self._from_storage(
                f"{rollback.why}, but from step {rollback.back_to} or before {self.restoring.none.reason}", situation
            )
        else:
            self._from_memory(rollback.why, situation)


def _is_newer(one: SnapshotKey, other: SnapshotKey) -> bool:
    """A later attempt has decided what to go on from: what it wrote counts first."""
    return (one.attempt, one.branch, one.step) > (other.attempt, other.branch, other.step)
