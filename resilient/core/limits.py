"""What the user allows, and the few times that everything else is derived from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    min_workers: int
    max_workers: int
    spares: int = 0
    snapshots: bool = False
    """Whether keepers hold any."""
    checkpoints: bool = False
    """Whether keepers write some of them to storage."""
    wait_for_nodes_s: float = 600.0
    """How long the run may stand still below `min_workers`."""
    detection_s: float = 2.0
    max_failures: int | None = None
    """Ranks and nodes that may be lost within an hour."""
    evict_stragglers: bool = False

    @property
    def settle_s(self) -> float:
        """How long a broken link may take to turn out to be a death."""
        return self.detection_s / 4

    @property
    def stall_s(self) -> float:
        """How long nothing may come from others until a rank says so."""
        return 5 * self.detection_s

    @property
    def place_s(self) -> float:
        """How long a rank may take to begin on a node where nothing is free: as long as a process takes to start on a
        busy machine, since Ray doesn't tell whether it has a place."""
        return 30 * self.detection_s

    @property
    def reach_s(self) -> float:
        """How long another may take to answer whether it can be reached."""
        return 2 * self.detection_s

    @property
    def resend_s(self) -> float:
        return self.detection_s / 4

    def lost_limit_s(self, some_are_absent: bool) -> float:
        """How long nothing may be found to go on from; a keeper that is being replaced may still have it."""
        return (15 if some_are_absent else 1) * self.detection_s

    @property
    def start_together_s(self) -> float:
        """How long ranks that are ready wait for others that are still starting."""
        return 15 * self.detection_s
