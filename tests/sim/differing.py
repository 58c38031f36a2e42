"""Members of a generation find that they hold different states: nobody goes on, and all ask for the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from resilient.core.difference import rollback_after
from resilient.core.lane import NOBODYS
from resilient.core.seat import Rollback

if TYPE_CHECKING:
    from .group import Group


def states_differ(group: Group, step: int) -> None:
    """As the exchange of this step shows."""
    group.world.flips.found(group.plan, step)
    digests = [group.submissions[step][number].wish.digest for number in group.plan.members]
    given = [NOBODYS if each is None else each for each in digests]
    wanted = rollback_after(group.plan, step, given, newest_verified(group))
    want_back(group, wanted, lambda number: group.break_exchange(number, step))


def newest_verified(group: Group) -> int:
    return max(group.member(number).capturing.verified_on(group.plan.branch) for number in group.plan.members)


def want_back(group: Group, wanted: Rollback, fail: Callable[[int], None]) -> None:
    """Each asks for it by itself. Whoever was named may be ended before all have learned of it: `fail` is what happens
    to some of the others then."""
    world = group.world
    world.seen["states differed"] += 1
    world.tell(f"{wanted.why}: back to {wanted.back_to}")

    def told(number: int) -> None:
        if not group.within(number):
            return
        if not all(group.member_lives(suspect) for suspect in wanted.suspects) and world.flips.misses():
            world.seen["ended before all knew that it differed"] += 1
            fail(number)
            return
        group.member(number).run(lambda: group.member(number).tell_seat(wanted))

    for number in group.plan.members:
        world.at(world.rng.uniform(0.001, 0.12), lambda number=number: told(number))
    world.faults.point("differing", list(group.plan.members))
