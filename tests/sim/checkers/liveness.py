"""Without faults the run ends well; it fails only if the state is lost, and then it says so."""

from __future__ import annotations

from . import Checker


class Liveness(Checker):
    def on_ended(self) -> None:
        end = self.world.end
        self.require(end is not None, "nothing is left to happen, and the run has not ended")
        if end.outcome == "finished":
            return
        self.require(end.outcome == "failed", f"the run ended as {end.outcome}")
        self.require("held the state" in end.reason, f"the run failed for another reason: {end.reason}")
        self.require(self.world.lost_state_at is not None, f"the state was not lost: {end.reason}")
