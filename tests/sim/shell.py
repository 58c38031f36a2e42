"""A controller process: the real `Control` and `Detector`, and what a shell around them does.

A shell repeats kills until they have happened, and shows a node to the core only while its keeper
is heard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import assert_never

from resilient.core.control import Control
from resilient.core.detector import Detector, Verdict, Vital
from resilient.core.events import (
    Event,
    GenerationCreated,
    GenerationTaken,
    NodeGone,
    NodeSeen,
    RankGone,
    Resumed,
    StorageSeen,
    Tick,
)
from resilient.core.instructions import (
    CreateGeneration,
    DecodeImages,
    End,
    Instruction,
    Kill,
    LetGo,
    LookAtStorage,
    ProbeLinks,
    Say,
    SendPlan,
    Spawn,
    TakeInventory,
)
from resilient.core.plan import Plan

from .questions import Questions

if TYPE_CHECKING:
    from .keeper import Keeper
    from .world import World

TICK_S = 0.25
KEEPER_STARTS_S = 5.0
NOTED = {
    "in proportion": "dealt in proportion",
    "no rank of stage": "stage lost",
    "ended with different states": "ends differed",
    "hand over their layers": "handed over",
    "dealt anew after a loss": "stages anew after a loss",
    "by what they were measured to take": "stages by what layers take",
}
"""What a plan's reason says, and what is counted for it."""


class Shell:
    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.control = Control(limits=world.setting.limits)
        self.detector = Detector(detection_s=world.setting.limits.detection_s)
        self.alive = True
        self.condemned: set[int] = set()
        self.keepers: set[str] = set()
        """Nodes whose keepers this controller counts with."""
        self.questions = Questions(self)
        self._beats: dict[str, int] = {}
        self._ended_keepers: set[Keeper] = set()

    def begin(self) -> None:
        world = self.world
        world.tell(f"controller {self.number} starts")
        if world.spawned_on_record or world.plans_on_record:
            self._find_keepers()
            plans = tuple(world.plans_on_record[number] for number in sorted(world.plans_on_record))
            gone = tuple(sorted(world.gone_on_record))
            self.take(Resumed(plans=plans, spawned=tuple(sorted(world.spawned_on_record.items())), gone=gone))
            for member in sorted(world.spawned_on_record):
                rank = world.ranks.get(member)
                self.detector.expect(world.spawned_on_record[member], world.now)
                rng = world.rng if rank is None or not rank.alive else world.records_rng if member in gone else None
                if rng is not None:
                    lost = RankGone(member=member, why="its process is not there")
                    world.at(rng.uniform(0.01, 1.0), lambda lost=lost: self.take(lost))
        world.at(0.0, self._tick)
        if world.setting.limits.snapshots:
            world.at(0.0, self.questions.tell_again)

    def _find_keepers(self) -> None:
        """Those that answer to their names; whoever died a moment ago may still seem to."""
        if not self.world.setting.limits.snapshots:
            return
        self.keepers = {name for name, node in self.world.nodes.items() if node.alive and not node.let_go}
        for name in sorted(self.keepers):
            self.detector.expect(name, self.world.now)
            if self.world.keeper_of(name) is None:
                self.detector.excuse(name, self.world.now + KEEPER_STARTS_S)
        if self.world.plans_on_record:
            self.questions.planned(self.world.plans_on_record[max(self.world.plans_on_record)])

    def die(self) -> None:
        self.world.tell(f"controller {self.number} dies")
        self.alive = False
        newest = self.control.current
        if self.control.creating is not None:
            self.world.seen["controller killed while creating a generation"] += 1
        elif newest is not None and self.world.newest_formed < newest.generation:
            self.world.seen["controller killed while a generation formed"] += 1
        if self.control.restoring.asked and self.control.formed is not self.control.current:
            self.world.seen["controller killed on the way back to a snapshot"] += 1
        self.world.controller_died()

    def take(self, event: Event) -> None:
        if not self.alive:
            return
        for instruction in self.control.handle(event, self.world.now):
            if self.alive:
                self._carry_out(instruction)

    def beat(self, node: str, number: int, keeper: Keeper | None, vitals: tuple[Vital, ...]) -> None:
        if not self.alive or number <= self._beats.get(node, 0) or self.world.nodes[node].let_go:
            return
        self._beats[node] = number
        if keeper is not None and keeper in self._ended_keepers:
            return
        self.keepers.add(node)
        self.questions.heard(node)
        self.take(NodeSeen(node=node, capacity=self.world.nodes[node].capacity))
        for vital in vitals:
            if vital.alive and self.control.membership.is_gone(vital.member):
                self._kill(vital.member, node, "was seen alive")
        for verdict in self.detector.beat(node, vitals, self.world.now):
            self._pass_on(verdict)

    def node_ended(self, node: str) -> None:
        keeper = self.world.nodes[node].keeper
        if keeper is not None:
            self._ended_keepers.add(keeper)
        if self.alive:
            self._pass_on(self.detector.node_ended(node, self.world.now))

    def keeper_ended(self, node: str, keeper: Keeper) -> None:
        """Its ranks live on: another takes its place, and until then its silence means nothing."""
        self._ended_keepers.add(keeper)
        if self.alive and node in self.detector.nodes:
            self.detector.excuse(node, self.world.now + KEEPER_STARTS_S)

    def forget(self, node: str) -> None:
        """It was let go."""
        self.detector.forget_node(node)
        self.questions.forget(node)

    @property
    def answering(self) -> set[str]:
        """Nodes whose keepers it counts with: all but those that have not answered the last time."""
        return self.keepers - self.questions.absent

    def _tick(self) -> None:
        if not self.alive:
            return
        for verdict in self.detector.verdicts(self.world.now):
            self._pass_on(verdict)
        self.take(Tick())
        self.world.at(TICK_S, self._tick)

    def _pass_on(self, verdict: Verdict) -> None:
        if verdict.what == "node":
            self.questions.forget(verdict.node)
            self.take(NodeGone(node=verdict.node, why=verdict.why, silent_s=verdict.silent_s))
        else:
            self.take(RankGone(member=verdict.member, why=verdict.why, silent_s=verdict.silent_s))

    def _carry_out(self, instruction: Instruction) -> None:
        world = self.world
        match instruction:
            case Spawn(member=member, node=node):
                self._spawn(member, node)
            case LetGo(node=node):
                world.drains.let_go(self, node)
            case Kill(released=True) if self.control.newest + 1 in world.plans_on_record:
                world.seen["release given up for another controller"] += 1
                taken = GenerationTaken(generation=self.control.newest + 1)
                world.at(world.drains.rng.uniform(0.0005, 0.05), lambda: self.take(taken))
            case Kill(member=member, node=node, reason=reason, released=True):
                world.tell(f"controller {self.number} releases rank {member}: {reason}")
                world.seen["released: " + reason] += 1
                world.drains.released.add(member)
                world.emit("released", member=member)
                self.condemned.add(member)
                world.at(world.drains.rng.uniform(0.01, 1.0), lambda: self._kill(member, node, reason))
            case Kill(member=member, node=node, reason=reason):
                world.tell(f"controller {self.number} condemns rank {member}: {reason}")
                if reason.startswith("left out"):
                    world.seen["orphan killed"] += 1
                self.condemned.add(member)
                world.condemned.setdefault(member, world.now)
                world.at(world.rng.uniform(0.01, 1.0), lambda: self._kill(member, node, reason))
                world.at(world.records_rng.uniform(0.0005, 0.05), lambda: self._on_record(member))
            case CreateGeneration(plan=plan):
                world.emit("decided", shell=self, plan=plan)
                world.at(world.rng.uniform(0.0005, 0.05), lambda: self._create(plan))
            case SendPlan(member=member, plan=plan):
                world.emit("plan_sent", shell=self, plan=plan)
                rank = world.ranks.get(member)
                if rank is not None and world.now >= world.nodes[rank.node].silent_until:
                    world.message(lambda: rank.run(lambda: rank.plan_arrived(plan)))
            case TakeInventory(asked=asked, ended=ended):
                self.questions.take_inventory(asked, ended)
            case DecodeImages(asked=asked, elected=elected):
                self.questions.decode(asked, elected)
            case LookAtStorage(asked=asked):
                self._look_at_storage(asked)
            case ProbeLinks():
                world.silent.probe(self, instruction)
            case Say(text=text) if "is a straggler" in text:
                world.tell(f"controller {self.number}: {text}")
                world.seen["straggler evicted" if "it leaves" in text else "straggler reported"] += 1
            case Say(text=text):
                world.tell(f"controller {self.number}: {text}")
            case End(outcome="superseded", reason=reason):
                world.seen["controller superseded"] += 1
                world.tell(f"controller {self.number} yields: {reason}")
                self.die()
            case End():
                world.finish(instruction, self)
            case _:
                assert_never(instruction)

    def _look_at_storage(self, asked: int) -> None:
        world = self.world
        if not world.healing and world.rng.random() < 0.2:
            world.seen["storage could not be listed"] += 1
            answer = StorageSeen(asked=asked, error="not now")
        else:
            answer = StorageSeen(asked=asked, checkpoints=world.storage.listed())
        world.at(world.rng.uniform(0.01, 1.0), lambda: self.take(answer))

    def _spawn(self, member: int, node: str) -> None:
        world = self.world
        world.tell(f"controller {self.number} spawns rank {member} on {node}")
        if member in world.spawned_on_record:
            world.seen["controller yielded over a spawn"] += 1
            self.die()
            return
        world.spawned_on_record[member] = node

        def start() -> None:
            if self.alive and not world.start_rank(member, node):
                self.take(RankGone(member=member, why="could not be started"))

        world.at(world.rng.uniform(0.05, 0.5), start)

    def _create(self, plan: Plan) -> None:
        if not self.alive:
            return
        world = self.world
        if plan.generation in world.plans_on_record:
            answer: Event = GenerationTaken(generation=plan.generation)
        else:
            world.plans_on_record[plan.generation] = plan
            world.tell(
                f"controller {self.number} creates generation {plan.generation} ({plan.kind}, from {plan.base}) "
                f"of {plan.members}: {plan.reason}"
            )
            world.flips.created(plan)
            world.emit("created", shell=self, plan=plan)
            world.drains.planned(self, plan)
            world.look_for_state()
            world.seen[f"{plan.kind} generation"] += 1
            for text, name in NOTED.items():
                world.seen[name] += text in plan.reason
            if world.setting.limits.snapshots:
                self.questions.planned(plan)
            answer = GenerationCreated(generation=plan.generation)
        world.at(world.rng.uniform(0.0005, 0.05), lambda: self.take(answer))
        world.faults.controller_point()

    def _on_record(self, member: int) -> None:
        if self.alive:
            self.world.gone_on_record.add(member)

    def _kill(self, member: int, node: str, reason: str) -> None:
        """Ends the process if its node can be reached; if not, whoever sees it alive in a heartbeat kills it."""
        rank = self.world.ranks.get(member)
        if rank is not None and rank.node == node and self.world.now >= self.world.nodes[node].silent_until:
            self.world.kill_rank(member, f"killed ({reason})")
