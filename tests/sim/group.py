"""The communicator of one generation: forms, levels its members, and exchanges, or breaks on the way.

Whatever breaks, each member learns of it by itself: late, or not at all. When nobody has died, at
least one that waits learns of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from resilient.core.lane import Agreed, Wish
from resilient.core.plan import Plan

from .back import WayBack
from .capturing import Submission
from .checkers import Violation
from .closing import Closing, learn_outcome
from .differing import states_differ
from .moving import Moving
from .stages import is_staged
from .truth import Complete, State, outcome_of, sums_of

if TYPE_CHECKING:
    from .rank import Rank
    from .world import World

AGAIN_S = 0.05


class Group:
    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.called: set[int] = set()
        self.leveling = False
        self.formed: set[int] = set()
        self.entered = False
        """Whether all members have entered the barrier."""
        self.broken = False
        self.noticing: set[int] = set()
        """Members that will learn of the broken link."""
        self.told: set[int] = set()
        self.submissions: dict[int, dict[int, Submission]] = {}
        self.delivering: dict[int, set[int]] = {}
        """For each completed step the members that have not heard yet."""

    # Members

    def member(self, number: int) -> Rank:
        return self.world.ranks[number]

    def within(self, number: int) -> bool:
        """Whether a member lives and has not adopted a newer generation."""
        rank = self.member(number)
        return rank.alive and rank.seat.plan is not None and rank.seat.plan.generation == self.plan.generation

    def whole(self) -> bool:
        return not self.broken and all(self.within(number) for number in self.plan.members)

    def paused(self) -> bool:
        return any(self.member(number).stopped for number in self.plan.members)

    # Forming

    def called_by(self, rank: Rank) -> None:
        self.called.add(rank.member)
        self.world.faults.point("forming", list(self.plan.members))
        if not self.member_lives(self.plan.members[0]):
            self.world.seen["the store's host died while forming"] += 1
        if self.called == set(self.plan.members):
            self.then(self.world.rng.uniform(0.003, 0.1), self._compare)
        elif any(not self.member_lives(number) for number in self.plan.members):
            self.fail_later(rank.member)

    def member_lives(self, number: int) -> bool:
        return number in self.world.ranks and self.member(number).alive

    def then(self, delay: float, action: Callable[[], None]) -> None:
        """Go on after a delay, unless the formation has failed by then; a stopped member makes all wait."""

        def go_on() -> None:
            if not self.whole():
                self._fail_formation()
            elif self.paused() or self.world.silent.within(self.plan):
                self.world.at(AGAIN_S * 4, go_on)
            else:
                action()

        self.world.at(delay, go_on)

    def _compare(self) -> None:
        """Who has what: the newest complete step, and who has to get its result."""
        self.leveling = True
        if self.plan.restore is not None:
            WayBack(self, self.plan.restore).begin()
            return
        self.world.faults.point("leveling", list(self.plan.members))
        holders = [number for number in self.plan.members if self.member(number).seat.has_state]
        if not holders:
            raise Violation("group", f"nobody in generation {self.plan.generation} holds the state")
        complete = max(self.member(number).seat.complete for number in holders)
        behind = []
        for number in holders:
            seat = self.member(number).seat
            if seat.complete < complete - 1:
                raise Violation("group", f"rank {number} lacks more than one result: {seat.complete} of {complete}")
            if seat.complete < complete:
                behind.append(number)
        servers = [number for number in holders if self.member(number).seat.complete == complete]
        self._serve(behind, servers, complete)

    def _serve(self, behind: list[int], servers: list[int], complete: int) -> None:
        if not behind:
            self.level_state(complete)
            return
        if is_staged(self.plan):
            learn_outcome(self, behind, servers, complete)
            return
        number, server = behind[0], self.world.rng.choice(servers)
        self.world.faults.serving(server, number)

        def serve() -> None:
            kept = self.member(server).kept
            if kept is None or kept.step != complete:
                raise Violation("group", f"rank {server} has not kept the result of step {complete}: {kept}")
            self.member(number).received_result = self.plan.generation, kept
            self._serve(behind[1:], servers, complete)

        self.then(self.world.rng.uniform(0.01, 0.15), serve)

    def level_state(self, complete: int) -> None:
        stateless = [number for number in self.plan.members if not self.member(number).seat.has_state]
        holders = [number for number in self.plan.members if self.member(number).seat.has_state]
        if self.plan.kind != "unplanned" and not all(self._gives(number) for number in holders):
            self.then(AGAIN_S, lambda: self.level_state(complete))
            return
        if stateless and self.plan.kind == "unplanned":
            raise Violation("group", f"members {stateless} of {self.plan} hold no state")
        if self.plan.kind != "unplanned" and self.plan.stages:
            Moving(self, complete).begin()
        elif stateless:
            self._give(stateless, holders, complete)
        else:
            self.level(complete)

    def _gives(self, number: int) -> bool:
        """Whether this member can give its state of the boundary, if somebody wants it."""
        rank = self.member(number)
        if self.plan.kind == "planned" and not self.plan.stages:
            return not self.plan.joiners or (rank.held is not None and rank.held[0] == self.plan.generation)
        return rank.seat.at_boundary

    def level(self, complete: int) -> None:
        """All members are; only the barrier is left."""
        self.then(self.world.rng.uniform(0.001, 0.03), lambda: self._barrier(complete))

    def _give(self, stateless: list[int], givers: list[int], complete: int) -> None:
        if not stateless:
            self.level(complete)
            return
        number, giver = stateless[0], self.world.rng.choice(givers)
        self.world.faults.point("joining", [number, giver])

        def give() -> None:
            rank = self.member(giver)
            state: State = rank.held[1] if self.plan.kind == "planned" and rank.held is not None else rank.state
            self.member(number).receive_state(self.plan.generation, complete, state)
            self._give(stateless[1:], givers, complete)

        self.then(self.world.rng.uniform(0.01, 0.3), give)

    def _barrier(self, complete: int) -> None:
        self.entered = True
        self.world.faults.point("barrier", list(self.plan.members))
        for number in self.plan.members:
            self.world.at(
                self.world.rng.uniform(0.001, 0.08), lambda number=number: self._told_formed(number, complete)
            )

    def _told_formed(self, number: int, complete: int) -> None:
        if not self.within(number):
            return
        rank = self.member(number)
        harmed = self.broken or any(not self.member_lives(other) for other in self.plan.members)
        if harmed and number not in self.told and (number in self.noticing or self.world.rng.random() < 0.5):
            self.world.seen["formation seen by some members only"] += 1
            self.fail_later(number)
            return

        def tell() -> None:
            if number not in self.told and self.within(number):
                self.formed.add(number)
                rank.formed(self.plan.generation, complete)

        rank.run(tell)

    def _fail_formation(self) -> None:
        for number in self.plan.members:
            if self.within(number) and number not in self.formed and number in self.called:
                self.fail_later(number)

    def fail_later(self, number: int) -> None:
        """The member learns after a while that forming failed, or never, unless it has to."""
        if number in self.told or (number not in self.noticing and self.world.rng.random() < 0.4):
            return
        self.told.add(number)
        rank = self.member(number)
        rank.later(self.world.rng.uniform(0.02, 0.6), lambda: rank.form_failed(self.plan.generation))

    # Exchanging

    def submitted_by(self, rank: Rank, step: int) -> None:
        self.world.emit("submitted", rank=rank)
        seat = rank.seat
        values = {leaf: rank.partial[leaf] for leaf in seat.folded}
        wish = rank.capturing.wish(self.plan, step)
        mine = Submission(frozenset(seat.folded), values, seat.newest_held, wish, self._row(rank.member, wish))
        here = self.submissions.setdefault(step, {})
        here[rank.member] = mine
        self.world.faults.point("exchanging", list(self.plan.members))
        if self.broken or any(not self.member_lives(number) for number in self.plan.members):
            self.break_exchange(rank.member, step)
        elif set(here) == set(self.plan.members):
            self._when_heard(step)

    def _when_heard(self, step: int) -> None:
        """What is exchanged comes through only where no link is silent."""
        if not self.world.silent.within(self.plan):
            self._complete(step)
        elif self.whole():
            self.world.at(AGAIN_S * 4, lambda: self._when_heard(step))
        else:
            for number in self.plan.members:
                if self.within(number):
                    self.break_exchange(number, step)

    def _row(self, number: int, wish: Wish) -> list[int]:
        return wish.lane(self.plan.stage_number(self.plan.rank_of(number)), max(1, len(self.plan.stages)))

    def _complete(self, step: int) -> None:
        here = self.submissions[step]
        lane = Agreed.of([min(words) for words in zip(*(one.lane for one in here.values()), strict=True)])
        if lane.differs:
            states_differ(self, step)
            return
        if lane.verified:
            self.world.flips.agreed(self.plan, step)
        values: dict[int, dict[int, int]] = {}
        for number in self.plan.members:
            for leaf, by_layer in here[number].values.items():
                values[leaf] = values.get(leaf, {}) | by_layer
        sums, agreed = sums_of(values), min(submission.newest_held for submission in here.values())
        result = Complete(step, sums, outcome_of(sums), self.plan.generation)
        if is_staged(self.plan):
            Closing(self, result, agreed, lane).begin()
        else:
            self.deliver(result, agreed, lane)

    def deliver(self, result: Complete, agreed: int, lane: Agreed) -> None:
        """It stands; each member learns of it."""
        step = result.step
        contributions = {number: submission.leaves for number, submission in self.submissions[step].items()}
        self.world.emit("reduced", group=self, step=step, contributions=contributions)
        self.delivering[step] = set(self.plan.members)
        for number in self.plan.members:
            delay = self.world.rng.uniform(0.001, 0.12)
            if lane.protected >= 0 or lane.save or lane.verified:
                self.world.at(delay / 2, lambda number=number: self._told_lane(number, step, lane))
            self.world.at(delay, lambda number=number: self._told_done(number, agreed, result, lane))
        self.world.faults.point("exchanged", list(self.plan.members))

    def _told_lane(self, number: int, step: int, lane: Agreed) -> None:
        """The lane comes first: what it says counts even if the exchange then breaks."""
        if self.within(number):
            rank = self.member(number)
            rank.run(lambda: rank.capturing.lane_done(self.plan, step, lane))

    def _told_done(self, number: int, agreed: int, result: Complete, lane: Agreed) -> None:
        step = result.step
        if not self.within(number):
            return
        harmed = self.broken or any(not self.member_lives(other) for other in self.plan.members)
        if harmed and (number in self.noticing or self.world.rng.random() < 0.5):
            if 0 < len(self.delivering[step]) < self.plan.size:
                self.world.seen["exchange completed by some members only"] += 1
            self.break_exchange(number, step)
            return
        self.delivering[step].discard(number)
        rank = self.member(number)
        own = result._replace(sums={layer: result.sums[layer] for layer in rank.layers})
        rank.run(lambda: rank.exchange_done(self.plan, agreed, own, lane))

    def break_exchange(self, number: int, step: int) -> None:
        if number not in self.told and (number in self.noticing or self.world.rng.random() < 0.6):
            self.told.add(number)
            rank = self.member(number)
            rank.later(self.world.rng.uniform(0.01, 0.5), lambda: rank.exchange_failed(self.plan.generation, step))

    # What goes wrong

    def break_link(self) -> None:
        """A connection breaks, though everybody lives; of those that are not done yet, one at least will notice."""
        living = [number for number in self.plan.members if self.within(number)]
        last = self.world.setting.steps - 1
        unfinished = [number for number in living if self.member(number).seat.complete < last]
        if not unfinished or self.called != set(self.plan.members) or self.plan.size == 1:
            return
        self.world.tell(f"a link of generation {self.plan.generation} breaks")
        self.world.seen["link broken"] += 1
        self.world.disturbed = True
        self.broken = True
        self.noticing = {number for number in unfinished if self.world.rng.random() < 0.5}
        if not self.noticing:
            self.noticing = {self.world.rng.choice(unfinished)}
        if self.plan.stages:
            self._let_who_waits_notice(unfinished)
        self._wake()

    def _let_who_waits_notice(self, unfinished: list[int]) -> None:
        """The others may be waiting for what the furthest behind are to send, and those for bytes over the link that
        broke: they would get them otherwise."""
        progress = {number: (number in self.formed, self.member(number).seat.complete) for number in unfinished}
        behind = [number for number in unfinished if progress[number] == min(progress.values())]
        if self.noticing.isdisjoint(behind):
            self.noticing.add(self.world.rng.choice(behind))

    def member_died(self, number: int) -> None:
        if number not in self.plan.members or all(
            self.member(n).seat.plan is None for n in self.plan.members if n in self.world.ranks
        ):
            return
        if self.called and not self.formed and not self.entered:
            self.world.seen["death while forming"] += 1
            if number == self.plan.members[0]:
                self.world.seen["the store's host died while forming"] += 1
        if number in self.plan.joiners and self.plan.kind == "planned":
            seated = self.member(number).seat.formed >= self.plan.generation
            self.world.seen["joiner died after it was seated" if seated else "joiner died before it was seated"] += 1
        waiting = [step for step, left in self.delivering.items() if 0 < len(left) < self.plan.size]
        if waiting:
            self.world.seen["death while a result was on its way"] += 1
        self._wake()

    def _wake(self) -> None:
        """Those that wait in this group may learn that something is wrong."""
        for number in self.plan.members:
            if not self.member_lives(number) or not self.within(number):
                continue
            seat = self.member(number).seat
            if number not in self.formed:
                if number in self.called and not self.entered:
                    self.fail_later(number)
                continue
            on_its_way = number in self.delivering.get(seat.step, set())
            if number in self.submissions.get(seat.step, {}) and seat.complete < seat.step and not on_its_way:
                self.break_exchange(number, seat.step)
