"""Without faults the run ends well; it fails only if the state is lost, and then it says so.

With snapshots it fails only if none of those that are left can be read.
"""

from __future__ import annotations

from . import Checker


class Liveness(Checker):
    def on_ended(self) -> None:
        end = self.world.end
        self.require(end is not None, "nothing is left to happen, and the run has not ended")
        if end.outcome == "finished":
            return
        self.require(end.outcome == "failed", f"the run ended as {end.outcome}")
        if self.world.flips.excuses_the_end(end.reason):
            return
        if self.world.setting.limits.snapshots:
            self.nothing_readable(end.reason)
            return
        lost = "held the state" in end.reason or "only they held layers" in end.reason
        self.require(lost, f"the run failed for another reason: {end.reason}")
        self.require(self.world.lost_state_at is not None, f"the state was not lost: {end.reason}")

    def nothing_readable(self, reason: str) -> None:
        said = "no snapshot in memory can be read" in reason or "no keeper holds a snapshot" in reason
        self.require(said, f"the run failed for another reason: {reason}")
        if self.world.setting.limits.checkpoints:
            self.require("there is no checkpoint of it on storage" in reason, f"storage was not looked at: {reason}")
        found = self.world.protected.readable(
            self.world.ended_by.keepers, self.world.ended_by.control.restoring.line_to_look_on()
        )
        self.require(found is None, f"the run failed, though there was {found and found.reason}: {reason}")
