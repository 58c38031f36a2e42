"""The way back to a snapshot: what Control asks keepers, elects, has decoded, and makes of it, as transcripts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

from resilient.core.control import Control
from resilient.core.events import (
    Event,
    GenerationCreated,
    ImagesDecoded,
    InventoryTaken,
    NodeGone,
    NodeSeen,
    RankGone,
    RankReady,
    RankReported,
    Tick,
)
from resilient.core.instructions import CreateGeneration, DecodeImages, End, Instruction, SendPlan, TakeInventory
from resilient.core.limits import Limits
from resilient.core.plan import Address, Plan, Share
from resilient.core.restoring import Restoring
from resilient.core.seat import Rollback, SeatReport
from snapshot.core.decoding import Decode
from snapshot.core.inventory import ImageFound, Inventory, NodeImage, ParityFound, ShardFound, SnapshotKey
from snapshot.core.stripes import Group

GROUP = Group(nodes=("a", "b"), parity=1)
LIMITS = Limits(min_workers=1, max_workers=2, snapshots=True, detection_s=2.0)


def key(step: int, generation: int = 1) -> SnapshotKey:
    return SnapshotKey(attempt=1, branch=0, step=step, generation=generation)


def image(node: str) -> NodeImage:
    rank = GROUP.nodes.index(node)
    shard = ShardFound(rank=rank, world=2, ranges=((rank * 10, rank * 10 + 10),), state_bytes=20, skeleton="s")
    return NodeImage(node=node, image_bytes=4096, shards=(shard,))


def found(node: str, *steps: int, of: tuple[str, ...] = (), bad: bool = False) -> Inventory:
    """A keeper with its own image of these snapshots, those that it has decoded of others, and the peer's mirror."""
    other = next(name for name in GROUP.nodes if name != node)
    class_index = next(index for index in GROUP.classes if GROUP.row_of(node, index) == 0)
    images, parities = [], []
    for step in steps:
        for held in (node, *of):
            images.append(ImageFound(key=key(step), ring=1, image=image(held), readable=not bad))
        parities.append(
            ParityFound(key=key(step), ring=1, group=GROUP, class_index=class_index, row=0, images=(image(other),))
        )
    return Inventory(keeper=node, images=tuple(images), parities=tuple(parities))


@dataclass
class Scenario:
    """Node a with ranks 1, 3, ..., node b with 2, 4, ...; nothing has begun yet."""

    limits: Limits = LIMITS
    look_back: bool = False
    now: float = 0.0
    serial: int = 0
    control: Control = field(init=False)
    said: list[Instruction] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.control = Control(limits=self.limits, attempt=2 if self.look_back else 1)

    def take(self, event: Event, after_s: float = 0.01) -> tuple[Instruction, ...]:
        self.now += after_s
        out = self.control.handle(event, self.now)
        self.said += out
        return out

    def ready(self, *members: int) -> tuple[Instruction, ...]:
        out: tuple[Instruction, ...] = ()
        for member in members:
            address = Address(host="h", port=member)
            node = "ba"[member % 2]
            out = self.take(
                RankReady(
                    member=member, node=node, address=address, micro_batches=4, steps=9, probe="p", probe_fields="p"
                )
            )
        return out

    def report(
        self, member: int, generation: int, *, formed: int | None = None, broken: int = 0, complete: int = -1
    ) -> tuple[Instruction, ...]:
        self.serial += 1
        report = SeatReport(
            member=member,
            generation=generation,
            formed=generation if formed is None else formed,
            broken=broken,
            step=complete + 1,
            complete=complete,
            finished=False,
            waiting=False,
            serial=self.serial,
        )
        return self.take(RankReported(report=report))

    def nodes(self) -> Scenario:
        for node in ("a", "b"):
            self.take(NodeSeen(node=node, capacity=4))
        return self

    def begun(self) -> Scenario:
        """Ranks 1 and 2 in generation 1, formed."""
        self.nodes().ready(1, 2)
        self.take(GenerationCreated(generation=1))
        self.report(1, 1)
        self.report(2, 1)
        return self

    def all_lost(self) -> TakeInventory:
        """Both ranks die; the question that follows."""
        self.take(RankGone(member=1, why="killed"))
        self.take(GenerationCreated(generation=2))
        out = self.take(RankGone(member=2, why="killed"))
        return only(out, TakeInventory)

    def answer(self, *inventories: Inventory, absent: tuple[str, ...] = ()) -> tuple[Instruction, ...]:
        addresses = tuple((inventory.keeper, Address(host=inventory.keeper, port=7)) for inventory in inventories)
        asked = self.control.restoring.asked
        return self.take(InventoryTaken(asked=asked, inventories=inventories, addresses=addresses, absent=absent))

    def until_end(
        self, *inventories: Inventory, absent: tuple[str, ...] = (), limit_s: float = 60.0
    ) -> tuple[End, float]:
        """Time passes, and whatever is asked gets this answer. The end, and how long it took."""
        began = self.now
        while self.now - began < limit_s:
            out = self.take(Tick(), after_s=0.25)
            if any(isinstance(instruction, TakeInventory) for instruction in out):
                out += self.answer(*inventories, absent=absent)
            for instruction in out:
                if isinstance(instruction, End):
                    return instruction, self.now - began
        raise AssertionError(f"no end after {limit_s} s")


def only(out: tuple[Instruction, ...], kind: type) -> object:  # type: ignore[type-arg]
    matching = [instruction for instruction in out if isinstance(instruction, kind)]
    assert len(matching) == 1, out
    return matching[0]


def plan_of(out: tuple[Instruction, ...]) -> Plan:
    return cast(CreateGeneration, only(out, CreateGeneration)).plan


def kinds(out: tuple[Instruction, ...]) -> set[str]:
    return {type(instruction).__name__ for instruction in out}


def test_without_snapshots_nobody_is_asked() -> None:
    run = Scenario(limits=Limits(min_workers=1, max_workers=2)).begun()
    run.take(RankGone(member=1, why="killed"))
    run.take(GenerationCreated(generation=2))
    assert "TakeInventory" not in kinds(run.take(RankGone(member=2, why="killed")))


def test_as_long_as_one_rank_holds_the_state_nobody_is_asked() -> None:
    run = Scenario().begun()
    assert kinds(run.take(RankGone(member=1, why="killed"))) == {"Kill", "CreateGeneration", "Spawn"}


def test_elected_at_once_and_restored_by_fresh_ranks() -> None:
    run = Scenario().begun()
    question = run.all_lost()
    assert question == TakeInventory(asked=1, ended=(1, 2))
    assert "CreateGeneration" not in kinds(run.answer(found("a", 4), found("b", 4)))  # nobody is ready yet
    run.ready(3)
    plan = plan_of(run.ready(4))
    assert (plan.generation, plan.base, plan.kind, plan.members, plan.joiners) == (3, 1, "restored", (3, 4), ())
    assert plan.restore is not None and plan.restore.key == key(4) and not plan.restore.decoded
    assert plan.restore.shares == (
        Share(rank=0, node="a", keeper=Address(host="a", port=7)),
        Share(rank=1, node="b", keeper=Address(host="b", port=7)),
    )
    sent = run.take(GenerationCreated(generation=3))
    assert sent == (SendPlan(member=3, plan=plan), SendPlan(member=4, plan=plan))
    assert run.report(3, 3, complete=3) == ()
    assert run.control.formed == plan


def test_what_is_lost_is_decoded_and_seen_in_the_next_inventory() -> None:
    run = Scenario().begun()
    run.all_lost()
    run.ready(3, 4)
    decode = cast(DecodeImages, only(run.answer(found("a", 4)), DecodeImages))
    assert [type(part) for part in decode.elected.images if part.image.node == "b"] == [Decode]
    assert kinds(run.take(Tick(), after_s=5.0)) <= {"Spawn"}  # it may take its time
    assert only(run.take(ImagesDecoded(asked=decode.asked)), TakeInventory) == TakeInventory(asked=2, ended=(1, 2))
    plan = plan_of(run.answer(found("a", 4, of=("b",))))
    assert plan.restore is not None and plan.restore.decoded
    assert [share.keeper.host for share in plan.restore.shares] == ["a", "a"]


def test_answers_to_an_older_question_count_for_nothing() -> None:
    run = Scenario().begun()
    run.all_lost()
    run.ready(3, 4)
    late = InventoryTaken(asked=0, inventories=(found("a", 4), found("b", 4)), addresses=(), absent=())
    assert run.take(late) == ()
    assert run.control.restoring.elected is None


def test_nothing_readable_ends_the_run_after_the_limit_and_says_so() -> None:
    run = Scenario().begun()
    run.all_lost()
    run.answer(Inventory(keeper="a"), Inventory(keeper="b"))
    end, after_s = run.until_end(Inventory(keeper="a"), Inventory(keeper="b"))
    assert end.outcome == "failed" and 1.5 <= after_s <= 3.0
    assert "no rank of generation 1 is left" in end.reason
    assert "no keeper holds a snapshot on the newest branch's line" in end.reason


def test_a_keeper_that_is_absent_is_waited_for() -> None:
    run = Scenario().begun()
    run.all_lost()
    run.answer(Inventory(keeper="a"), absent=("b",))
    _, after_s = run.until_end(Inventory(keeper="a"), absent=("b",))
    assert 25.0 <= after_s <= 35.0


def test_an_absent_keeper_that_comes_back_is_heard() -> None:
    run = Scenario().begun()
    run.all_lost()
    run.ready(3, 4)
    run.answer(Inventory(keeper="a"), absent=("b",))
    run.take(Tick(), after_s=1.0)
    assert plan_of(run.answer(found("b", 4, of=("a",)), Inventory(keeper="a"))).kind == "restored"


def test_a_slow_answer_is_waited_for_though_the_last_one_had_nothing() -> None:
    run = Scenario().begun()
    run.all_lost()
    run.ready(3, 4)
    run.answer(Inventory(keeper="a"), absent=("b",))
    assert "TakeInventory" in kinds(run.take(Tick(), after_s=1.0))
    assert "TakeInventory" not in kinds(run.take(Tick(), after_s=5.0))
    assert "End" not in kinds(run.take(Tick(), after_s=24.5)), "though its time is up"
    assert plan_of(run.answer(found("a", 4), found("b", 4))).kind == "restored"


def test_a_node_that_comes_is_asked_before_the_run_is_given_up() -> None:
    run = Scenario().begun()
    run.all_lost()
    run.take(NodeGone(node="b", why="silent"))
    run.answer(Inventory(keeper="a"))
    run.take(Tick(), after_s=1.0)
    assert "TakeInventory" in kinds(run.take(NodeSeen(node="b", capacity=4), after_s=0.9))
    assert "End" not in kinds(run.take(Tick(), after_s=1.0))


def test_a_node_lost_after_the_election_means_asking_again() -> None:
    run = Scenario().begun()
    run.all_lost()
    run.answer(found("a", 4), found("b", 4))
    assert run.control.restoring.elected is not None
    out = run.take(NodeGone(node="b", why="silent"))
    assert cast(TakeInventory, only(out, TakeInventory)).asked == 2
    run.ready(3)
    assert "CreateGeneration" not in kinds(run.take(Tick(), after_s=1.0))


def restored() -> Scenario:
    """Generation 3 of ranks 3 and 4 is created from step 4 and has not formed."""
    run = Scenario().begun()
    run.all_lost()
    run.ready(3, 4)
    run.answer(found("a", 4), found("b", 4))
    run.take(GenerationCreated(generation=3))
    run.report(3, 3, formed=0)
    run.report(4, 3, formed=0)
    return run


def test_a_restored_generation_that_loses_a_member_is_restored_again() -> None:
    run = restored()
    out = run.take(RankGone(member=4, why="killed"))
    assert only(out, TakeInventory) == TakeInventory(asked=2, ended=(1, 2, 4))
    run.ready(6)
    plan = plan_of(run.answer(found("a", 4), found("b", 4)))
    assert (plan.generation, plan.base, plan.kind, plan.members) == (4, 1, "restored", (3, 6))


def test_a_restored_generation_that_can_not_load_is_restored_again() -> None:
    run = restored()
    assert run.report(3, 3, formed=0, broken=3) == ()
    assert only(run.take(Tick(), after_s=1.0), TakeInventory) == TakeInventory(asked=2, ended=(1, 2))
    plan = plan_of(run.answer(found("a", 3, of=("b",))))
    assert plan.members == (3, 4) and plan.restore is not None and plan.restore.key == key(3)


def test_a_restored_generation_that_somebody_saw_formed_is_gone_on_from() -> None:
    run = restored()
    run.report(3, 3, complete=3)
    plan = plan_of(run.take(RankGone(member=4, why="killed")))
    assert (plan.kind, plan.base, plan.members) == ("unplanned", 3, (3,))


def test_one_that_formed_unheard_of_is_gone_on_from_though_another_restored_one_was_made() -> None:
    run = restored()
    run.take(RankGone(member=4, why="killed"))
    run.ready(6)
    run.answer(found("a", 4), found("b", 4))
    run.take(GenerationCreated(generation=4))
    plan = plan_of(run.report(3, 3, complete=3))  # it refuses generation 4: that knows nothing of generation 3
    assert (plan.generation, plan.kind, plan.base, plan.members) == (5, "unplanned", 3, (3,))


def test_a_run_submitted_again_begins_at_0_where_nothing_is_left() -> None:
    run = Scenario(look_back=True).nodes()
    run.ready(1)
    assert only(run.ready(2), TakeInventory) == TakeInventory(asked=1, ended=())
    plan = plan_of(run.answer(Inventory(keeper="a"), Inventory(keeper="b")))
    assert plan.kind == "initial" and plan.restore is None


def test_a_run_submitted_again_goes_on_from_what_is_left() -> None:
    run = Scenario(look_back=True).nodes()
    run.ready(1, 2)
    plan = plan_of(run.answer(found("a", 4), found("b", 4)))
    assert (plan.generation, plan.base, plan.kind, plan.members) == (1, 0, "restored", (1, 2))
    run.take(GenerationCreated(generation=1))
    run.report(1, 1, complete=3)
    assert run.control.formed == plan


def test_a_run_submitted_again_never_begins_anew_in_silence_over_what_can_not_be_read() -> None:
    run = Scenario(look_back=True).nodes()
    run.ready(1, 2)
    end = cast(End, only(run.answer(found("a", 4, bad=True), Inventory(keeper="b")), End))
    assert end.outcome == "failed" and "an earlier attempt of this run has left snapshots, but" in end.reason
    assert str(key(4)) in end.reason


def test_a_run_submitted_again_waits_for_keepers_that_are_absent() -> None:
    run = Scenario(look_back=True).nodes()
    run.ready(1, 2)
    assert "CreateGeneration" not in kinds(run.answer(Inventory(keeper="a"), absent=("b",)))
    run.take(Tick(), after_s=1.0)
    assert plan_of(run.answer(found("a", 4), found("b", 4))).kind == "restored"


def test_a_run_submitted_again_does_not_begin_anew_while_a_keeper_is_asked_once_more() -> None:
    run = Scenario(look_back=True).nodes()
    run.ready(1, 2)
    run.answer(Inventory(keeper="a"), absent=("b",))
    assert "TakeInventory" in kinds(run.take(Tick(), after_s=29.0))
    assert "CreateGeneration" not in kinds(run.take(Tick(), after_s=5.0)), "an answer is on its way"
    assert plan_of(run.answer(found("a", 4), found("b", 4))).kind == "restored"


# Restoring by itself


def test_a_question_is_repeated_when_no_answer_comes() -> None:
    restoring = Restoring(ask_again_s=0.5, answer_limit_s=30.0)
    assert restoring.ask((3,), 0.0) == (TakeInventory(asked=1, ended=(3,)),)
    assert restoring.ask((3,), 29.0) == ()
    assert restoring.ask((3, 4), 30.0) == (TakeInventory(asked=2, ended=(3, 4)),)


def test_what_was_elected_is_kept_until_something_changes() -> None:
    restoring = Restoring(ask_again_s=0.5, answer_limit_s=30.0)
    restoring.ask((), 0.0)
    addresses = (("a", Address(host="a", port=1)), ("b", Address(host="b", port=1)))
    answer = InventoryTaken(asked=1, inventories=(found("a", 4), found("b", 4)), addresses=addresses, absent=())
    assert restoring.answered(answer, 1.0) == () and restoring.elected is not None
    assert restoring.ask((), 99.0) == ()
    restoring.again()
    assert restoring.elected is None and restoring.ask((), 99.0) == (TakeInventory(asked=2, ended=()),)


def test_what_differs_again_and_again_ends_the_run() -> None:
    """The ranks' own code makes their states differ: going back brings the same again, for ever."""
    run, ended, plans = Scenario().begun(), "", list[Plan]()
    wanted = Rollback(back_to=4, skip_from=0, skip_to=-1, why="the ranks' states differ")
    while len(plans) < 10:
        run.serial += 1
        report = replace(run.control.membership.members[1].report, rollback=wanted, serial=run.serial)  # type: ignore[type-var]
        run.take(RankReported(report=report))
        out = run.answer(found("a", 4), found("b", 4))
        if "End" in kinds(out):
            ended = cast(End, only(out, End)).reason
            break
        plans.append(plan_of(out))
        run.take(GenerationCreated(generation=plans[-1].generation))
        for member in (1, 2):
            run.report(member, plans[-1].generation, complete=8)
    assert len(plans) == 3 and "it came again each of the 3 times" in ended
