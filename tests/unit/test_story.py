"""What is told of a run: each thing once, however often its facts are repeated."""

from __future__ import annotations

from dataclasses import dataclass, field

from resilient.core.control import Control
from resilient.core.events import (
    Event,
    GenerationCreated,
    NodeGone,
    NodeLeaving,
    NodeSeen,
    RankGone,
    RankReady,
    RankReported,
    Resumed,
    StopAsked,
    Tick,
)
from resilient.core.limits import Limits
from resilient.core.plan import Address
from resilient.core.seat import SeatReport
from resilient.core.story import Happening, Story


@dataclass
class Run:
    control: Control = field(default_factory=lambda: Control(limits=Limits(min_workers=1, max_workers=2)))
    story: Story = field(default_factory=Story)
    now: float = 0.0
    reports: int = 0

    def take(self, event: Event) -> list[Happening]:
        self.now += 0.01
        return self.story.after(event, self.control.handle(event, self.now), self.control)

    def ready(self, member: int) -> list[Happening]:
        return self.take(
            RankReady(
                member=member,
                node="a",
                address=Address(host="h", port=member),
                micro_batches=4,
                steps=3,
                probe="p",
                probe_fields="torch",
            )
        )

    def formed(self, member: int, generation: int, complete: int) -> list[Happening]:
        self.reports += 1
        report = SeatReport(
            member=member,
            generation=generation,
            formed=generation,
            broken=0,
            complete=complete,
            step=complete + 1,
            finished=False,
            waiting=False,
            serial=self.reports,
        )
        return self.take(RankReported(report=report))

    def trains(self) -> list[Happening]:
        """With two ranks, until the first step is committed."""
        told = self.take(NodeSeen(node="a", capacity=2))
        told += self.ready(1) + self.ready(2)
        told += self.take(GenerationCreated(generation=1))
        for member in (1, 2):
            told += self.formed(member, 1, -1)
        return told + self.formed(1, 1, 0)


def kinds(told: list[Happening]) -> list[str]:
    return [happening.kind for happening in told]


def test_how_a_run_begins() -> None:
    assert kinds(Run().trains()) == [
        *("node seen", "rank started", "rank started"),
        *("rank ready", "rank ready", "generation created", "generation formed"),
    ]


def test_facts_that_are_repeated_are_told_once() -> None:
    run = Run()
    run.trains()
    assert run.take(NodeSeen(node="a", capacity=2)) == []
    assert run.ready(1) == [] and run.formed(2, 1, 0) == [] and run.take(Tick()) == []
    assert kinds(run.take(NodeLeaving(node="a", why="spot"))) == ["node leaving"]
    assert run.take(NodeLeaving(node="a", why="spot")) == []


def test_a_recovery_with_all_its_phases() -> None:
    run = Run()
    run.trains()
    gone, *_ = run.take(RankGone(member=2, why="killed", silent_s=0.5))
    assert gone.kind == "rank gone" and gone.reason == "killed" and gone.generation == 1
    assert dict(gone.more) == {"member": 2, "node": "a", "rank": 1}
    assert run.take(RankGone(member=2, why="killed")) == []
    created, *_ = run.take(GenerationCreated(generation=2))
    assert created.kind == "generation created" and created.generation == 2 and created.more["ranks"] == 1
    assert kinds(run.formed(1, 2, 0)) == ["generation formed"]
    (ended,) = run.formed(1, 2, 1)
    assert ended.kind == "recovery ended" and "lost rank 1" in ended.reason
    assert ended.more["recovery"] == "rank lost" and ended.more["step"] == 1 and ended.more["detect_s"] == 0.5
    phases = [ended.more[f"{phase}_s"] for phase in ("detect", "decide", "form", "redo")]
    assert sum(phases) == ended.more["total_s"] and all(phase > 0 for phase in phases)


def test_a_node_that_is_lost_and_comes_back() -> None:
    run = Run()
    run.trains()
    assert kinds(run.take(NodeGone(node="a", why="silent")))[:3] == ["node gone", "rank gone", "rank gone"]
    assert run.take(NodeGone(node="a", why="silent")) == []
    assert "node seen" in kinds(run.take(NodeSeen(node="a", capacity=2)))


def test_a_controller_that_came_back_tells_only_what_is_new() -> None:
    before = Run()
    before.trains()
    assert before.control.current is not None
    after = Run()
    resumed = Resumed(plans=(before.control.current,), spawned=((1, "a"), (2, "a")))
    assert after.take(resumed) == []
    assert after.ready(1) == [] and after.ready(2) == []
    assert after.take(NodeSeen(node="a", capacity=2)) == []
    assert kinds(after.take(RankGone(member=2, why="killed"))) == ["rank gone"]


def test_after_the_end_nothing_is_told() -> None:
    run = Run()
    run.trains()
    run.take(StopAsked(why="enough"))
    assert run.take(RankGone(member=2, why="killed")) == []
