"""What must hold whatever fails. Each checker sees the facts that concern it, and raises `Violation` at the first wrong
one."""

from __future__ import annotations

from typing import Any


class Violation(AssertionError):
    def __init__(self, checker: str, text: str) -> None:
        super().__init__(f"{checker}: {text}")


class Checker:
    """Override `on_<fact>(**facts)` for the facts of interest."""

    def __init__(self, world: Any) -> None:
        self.world = world

    def require(self, holds: bool, text: str) -> None:
        if not holds:
            raise Violation(type(self).__module__.rsplit(".", 1)[-1], text)


def all_checkers(world: Any) -> list[Checker]:
    from .apply_only_complete import ApplyOnlyComplete
    from .apply_only_reduced import ApplyOnlyReduced
    from .back_only_when_lost import BackOnlyWhenLost
    from .drain_recomputes_nothing import DrainRecomputesNothing
    from .drained_is_empty import DrainedIsEmpty
    from .exact_result import ExactResult
    from .fenced_writers import FencedWriters
    from .generations_unique import GenerationsUnique
    from .layers_are_held import LayersAreHeld
    from .leaves_counted_once import LeavesCountedOnce
    from .liveness import Liveness
    from .no_durable_loss import NoDurableLoss
    from .no_fresh_start import NoFreshStart
    from .no_protected_loss import NoProtectedLoss
    from .no_zombie_effect import NoZombieEffect
    from .one_ruling_controller import OneRulingController
    from .one_step_apart import OneStepApart
    from .restored_state_is_true import RestoredStateIsTrue
    from .restored_together import RestoredTogether

    return [
        checker(world)
        for checker in (
            ApplyOnlyComplete,
            ApplyOnlyReduced,
            BackOnlyWhenLost,
            DrainRecomputesNothing,
            DrainedIsEmpty,
            ExactResult,
            FencedWriters,
            GenerationsUnique,
            LayersAreHeld,
            LeavesCountedOnce,
            Liveness,
            NoDurableLoss,
            NoFreshStart,
            NoProtectedLoss,
            NoZombieEffect,
            OneRulingController,
            OneStepApart,
            RestoredStateIsTrue,
            RestoredTogether,
        )
    ]
