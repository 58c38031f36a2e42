"""What a rank holds of a pipeline, and how that changes with the plan: memory, optimizer, sums, work.

All methods are called by a generation's thread while the training thread waits for something to do, but `settle`, if
the step has been begun by the very plan that is settled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import xxhash
from torch import Tensor
from torch.optim import Optimizer

from snapshot.absent import bring, is_absent, release
from snapshot.core.digest import StatePart
from snapshot.core.ranges import Ranges, merged
from snapshot.skeleton import Skeleton
from snapshot.table import StateTable

from .buffers import Buffers
from .core.plan import Plan
from .core.shards import Cut
from .pipeline import Pipeline, layer_of
from .shards import OptimizerShards
from .spelling import spelled, take, tensors_of
from .stage_work import StageWork, Timing
from .sums import StepSums
from .whereabouts import Whereabouts


class StageSide:
    """One rank's."""

    def __init__(
        self,
        name: str,
        pipe: Pipeline,
        optimizers: Sequence[tuple[str, Optimizer]],
        sums: StepSums,
        work: StageWork,
        shards: OptimizerShards | None,
    ) -> None:
        """name: by which the pipeline is protected. shards: if optimizer state is in any."""
        self.shards = shards
        self._name, self._pipe, self._optimizers, self._sums, self._work = name, pipe, optimizers, sums, work
        self.held = range(0)
        """The layers whose state this rank has."""
        self.whereabouts = Whereabouts(
            layers=_layers_by_tensor(name, pipe, optimizers), cuts=_cuts_by_place(shards, optimizers)
        )
        self.uses = _layers_by_use(name, pipe)
        """Of each use of a shared parameter, the first one too, the layer that it is in."""
        self._told: tuple[int, ...] = ()
        self._more_is_here = False
        """There may be memory for other layers than those that are held."""
        self._plan: Plan | None = None
        self._rank = 0
        self._shaped_for = range(0)
        """The layers that sums and work are for."""
        self._begun: Plan | None = None
        """By which the step has been begun, though not all of its layers' state is here yet."""
        self.goes_back = False
        """What has been begun so does not come about: a plan has been adopted that was made without it."""

    # The structure of what others hold

    def spelling(self) -> bytes:
        return spelled(self._optimizers, self._knows)

    def spelled_anew(self) -> bool:
        """Whether an optimizer keeps more or less of the parameters here than the others were told."""
        return self._kept() != self._told

    def take_spelling(self, told: Iterable[bytes]) -> None:
        take(self._optimizers, told, self._knows)
        self._told = self._kept()

    def _kept(self) -> tuple[int, ...]:
        """Counted: cheap enough for every step."""
        return tuple(
            count
            for _, optimizer in self._optimizers
            for count in (len(optimizer.state), sum(map(len, optimizer.state.values())))
        )

    def _knows(self, parameter: Tensor) -> bool:
        return not is_absent(parameter) and (self.shards is None or self.shards.knows(parameter))

    # Layers come and go

    def bring(self, plan: Plan, rank: int, *, initial: bool = False) -> None:
        """Have memory for the layers of this rank's stage, beside those whose state it has."""
        layers = _layers(plan, rank)
        self._more_is_here = True
        self._pipe.bring(layers, initial=initial)
        if self.shards is not None and not initial:
            self.shards.bring(plan, rank)
        else:
            for tensor in tensors_of(self._optimizers, self._pipe.needed(layers).values()):
                if is_absent(tensor):
                    bring(tensor)
        if not self.held:  # a change that has failed may have left others here
            self._keep_to(layers)

    def carry_on(self, plan: Plan) -> None:
        """An unplanned one: nothing changes hands."""
        if self.shards is not None:
            self.shards.carry_on(plan)

    def has_room_to_begin(self) -> bool:
        """Whether what is here now, layers that come and layers that go, may stay during a step."""
        most = self._pipe.rank_bytes
        here = (*self._pipe.parameters(), *self._pipe.buffers())
        return most is None or sum(tensor.nbytes for tensor in here if not is_absent(tensor)) <= most

    def begin(self, plan: Plan, rank: int) -> None:
        """Work by this plan from now on; what was here stays, until it is settled or gone back on."""
        self._begun, self.goes_back = plan, False
        self._take_up(plan, rank)

    def adopted(self, plan: Plan) -> None:
        """This is the rank's plan from now on; it holds when it has formed."""
        self.goes_back = self.goes_back or (self._begun is not None and plan.base < self._begun.generation)

    def settle(self, plan: Plan, rank: int) -> None:
        """The plan holds: only its layers are here from now on."""
        if self.goes_back:
            self._work.drop()
            self._shaped_for = range(0)
        layers = _layers(plan, rank)
        if layers != self.held or self._more_is_here:  # the second also after a change that has failed
            self._keep_to(layers)
        self.held = layers
        if self.shards is not None:
            self.shards.settle(plan, rank)
        if self._begun is not plan:
            self._take_up(plan, rank)
        self._work.disturbed()
        self._begun, self.goes_back = None, False

    def _take_up(self, plan: Plan, rank: int) -> None:
        self._plan, self._rank = plan, rank
        layers = _layers(plan, rank)
        if layers != self._shaped_for:
            self._shaped_for = layers
            self._reshape(layers)
        self._sums.elsewhere = frozenset(use for use, layer in self.uses.items() if layer not in layers)
        self._work.seated(plan, rank)

    def _keep_to(self, layers: range) -> None:
        self._more_is_here = False
        self._pipe.keep_to(layers)
        gone = [each for each in self._pipe.parameters() if is_absent(each)]
        for tensor in tensors_of(self._optimizers, gone) if self.shards is None else ():
            release(tensor)
        for parameter in gone:
            parameter.grad = None

    def wanted(self, plan: Plan, rank: int) -> Callable[[Skeleton], Ranges]:
        """Of a state, what this rank needs."""
        layers = _layers(plan, rank)
        if self.shards is None:
            return lambda skeleton: self.whereabouts.held(skeleton.tensors, layers)
        whereabouts, chunks = self.whereabouts, self.shards.owned(plan, rank)
        return lambda skeleton: merged(
            (*whereabouts.held(skeleton.tensors, layers), *whereabouts.owned(skeleton.tensors, chunks))
        )

    def part(self, table: StateTable) -> StatePart:
        """What this rank answers for in the state's digest."""
        ranges = self._known_to_all_of_the_stage(table) if self.shards is None else self.captured(table)
        return StatePart(
            skeleton=xxhash.xxh3_128_digest(table.skeleton),
            state_bytes=table.nbytes,
            ranges=ranges,
            digests=tuple(table.chunk_digests(start, stop) for start, stop in ranges),
        )

    def _known_to_all_of_the_stage(self, table: StateTable) -> Ranges:
        """What all of its ranks capture: then it is known as long as one of them has told it."""
        plan, rank = self._seat()
        return merged(
            piece
            for each in plan.team(rank)
            for piece in self.whereabouts.captured(table.layout.tensors, plan, each, None)
        )

    @property
    def is_only_one(self) -> bool:
        """Whether every rank has the whole state."""
        if self._plan is None or (self.shards is not None and self._plan.size > 1):
            return self._plan is None
        return len(self._plan.stages) == 1

    def _seat(self) -> tuple[Plan, int]:
        assert self._plan is not None
        return self._plan, self._rank

    def captured(self, table: StateTable) -> Ranges:
        """The bytes that this rank captures of a state."""
        plan, rank = self._seat()
        owners = None if self.shards is None else self.shards.owners(plan, rank)
        return self.whereabouts.captured(table.layout.tensors, plan, rank, owners)

    def begin_anew(self, plan: Plan, rank: int) -> None:
        """The state that was here counts no more: have memory for that of this rank's stage, and no other."""
        self.held = self._shaped_for = range(0)
        self._begun, self.goes_back = None, False
        if self.shards is not None:
            self.shards.begin_anew(plan)
        self.bring(plan, rank)

    @property
    def post_port(self) -> int:
        return self._work.post_port

    def all_through(self) -> None:
        """All ranks have done their forward and backward of this step."""
        self._work.all_through()

    @property
    def timing(self) -> Timing:
        return self._work.timing

    def _reshape(self, layers: range) -> None:
        pipe, name = self._pipe, self._name
        buffers = Buffers((f"{name}.layers.{number}", pipe.layers[number]) for number in layers)
        parameters = [(f"{name}.{own}", each) for own, each in pipe.needed(layers).items() if each.requires_grad]
        self._sums.reshape(
            parameters, [replace(use, name=f"{name}.{use.name}") for use in pipe.uses_in(layers)], buffers
        )


def _layers(plan: Plan, rank: int) -> range:
    stage = plan.stage_of(rank)
    assert stage is not None, plan
    return range(stage.first, stage.stop)


def _layers_by_tensor(
    name: str, pipe: Pipeline, optimizers: Sequence[tuple[str, Optimizer]]
) -> dict[str, tuple[int, ...]]:
    users: dict[str, tuple[int, ...]] = {}
    by_parameter: dict[int, tuple[int, ...]] = {}
    for own, tensor in (*pipe.named_parameters(), *pipe.named_buffers()):
        further = (use.layer for use in pipe.uses if use.of == own)
        users[f"user:{name}.{own}"] = by_parameter[id(tensor)] = (layer_of(own), *further)
    for optimizer_name, optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                users[f"user:{optimizer_name} group {number} parameter {position}"] = by_parameter[id(parameter)]
    return users


def _cuts_by_place(shards: OptimizerShards | None, optimizers: Sequence[tuple[str, Optimizer]]) -> Mapping[str, Cut]:
    found: dict[str, Cut] = {}
    for name, optimizer in optimizers if shards is not None else ():
        for number, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                if shards is not None and (cut := shards.cut_of(parameter)) is not None:
                    found[f"user:{name} group {number} parameter {position}"] = cut
    return found


def _layers_by_use(name: str, pipe: Pipeline) -> dict[str, int]:
    found: dict[str, int] = {}
    for of in dict.fromkeys(use.of for use in pipe.uses):
        found[f"{name}.{of}"] = layer_of(of)
        found.update({f"{name}.{use.name}": use.layer for use in pipe.uses if use.of == of})
    return found


def users_by_parameter(name: str, pipe: Pipeline) -> dict[str, list[str]]:
    """Of each shared parameter, all its uses in the order of their layers."""
    found: dict[str, list[str]] = {}
    for use in sorted(pipe.uses, key=lambda use: (use.layer, use.name)):
        found.setdefault(f"{name}.{use.of}", [f"{name}.{use.of}"]).append(f"{name}.{use.name}")
    return found
