"""Which chunks of optimizer state this rank owns, from plan to plan.

Who owns what follows from the plan and from what the ranks told each other when it was formed. It is kept by the
generation's number: an unplanned generation goes on with that of its base, whether this rank has seen the base formed
or not. What a rank had stays until a generation has formed in which it is another's.

All methods are called by a generation's thread while the training thread waits outside of the user's code, but those
of `Seated`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from snapshot.core import chunks as cuts_of_states

from .chunk_state import keep_runs
from .core.plan import Plan
from .core.shards import Cut, Dealt, Run, chunks_from, cuts_of, deal, spelled_chunks
from .pipeline import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Seated:
    """What holds between two changes."""

    plan: Plan
    rank: int
    dealt: Dealt
    owned: frozenset[int]

    @property
    def member(self) -> int:
        return self.plan.members[self.rank]

    @property
    def others(self) -> tuple[int, ...]:
        """The other members of this rank's stage."""
        return tuple(self.plan.members[rank] for rank in self.plan.team(self.rank) if rank != self.rank)


class OptimizerShards:
    """One rank's."""

    def __init__(self, pipe: Pipeline, optimizers: Sequence[tuple[str, Optimizer]]) -> None:
        """Raises ValueError for a parameter that can't be cut."""
        self._pipe, self._optimizers = pipe, optimizers
        self.cuts = cuts_of(_to_cut(pipe, optimizers), cuts_of_states.CHUNK_ELEMENTS)
        self._by_parameter = {
            id(parameter): self.cuts[name] for name, parameter in pipe.named_parameters() if name in self.cuts
        }
        self._dealt: dict[int, Dealt] = {}
        """By generation."""
        self.seated: Seated | None = None
        self._moving = False
        """Whether other chunks may be here than are owned."""

    def cut_of(self, parameter: Tensor) -> Cut | None:
        """None for one that no optimizer of the pipeline updates."""
        return self._by_parameter.get(id(parameter))

    def runs(self, parameter: Tensor) -> tuple[Run, ...]:
        """Which of its elements this rank updates: all of what is not cut."""
        cut = self.cut_of(parameter)
        if cut is None:
            return ((0, parameter.numel()),)
        assert self.seated is not None
        return cut.runs(self.seated.owned)

    def knows(self, parameter: Tensor) -> bool:
        """Whether what the optimizer keeps of it can be seen here."""
        return self.seated is None or bool(self.runs(parameter))

    # Who owns what

    def told(self) -> bytes:
        """What this rank has, to be told to the others."""
        return spelled_chunks(self.seated.owned if self.seated is not None else ())

    def deal(self, plan: Plan, told: Sequence[bytes] = ()) -> None:
        """told: by rank; left out where what ranks have does not count."""
        needed = [self._pipe.needed(range(stage.first, stage.stop)) for stage in plan.stages]
        self._dealt[plan.generation] = deal(plan, self.cuts, needed, [chunks_from(text) for text in told])

    def carry_on(self, plan: Plan) -> None:
        """Nobody has died, or this rank would not be asked: all own what they owned."""
        if plan.base in self._dealt:
            self._dealt[plan.generation] = self._dealt[plan.base]

    def owned(self, plan: Plan, rank: int) -> frozenset[int]:
        """The chunks of this rank under this plan."""
        return self._dealt[plan.generation].of(plan.members[rank])

    def owners(self, plan: Plan, rank: int) -> dict[int, int]:
        """Of each chunk that the rank's stage needs, the rank that owns it."""
        owners = self._dealt[plan.generation].owners[plan.stage_number(rank)]
        return {chunk: plan.rank_of(member) for chunk, member in owners.items()}

    def all_of(self, plan: Plan, rank: int) -> frozenset[int]:
        """The chunks of this rank's stage."""
        return frozenset(self._dealt[plan.generation].owners[plan.stage_number(rank)])

    # Memory

    def bring(self, plan: Plan, rank: int) -> None:
        """Have memory for what is this rank's, beside what it has."""
        former = self.seated.owned if self.seated is not None else frozenset()
        self._moving = True
        self._keep(former | self.owned(plan, rank))

    def settle(self, plan: Plan, rank: int) -> None:
        """The plan holds: only what is this rank's is here from now on."""
        former, owned = self.seated, self.owned(plan, rank)
        self._dealt = {plan.generation: self._dealt[plan.generation]}
        if former is None or former.owned != owned or self._moving:  # else the training thread may be using it
            self._keep(owned)
        self._moving = False
        self.seated = Seated(plan=plan, rank=rank, dealt=self._dealt[plan.generation], owned=owned)

    def begin_anew(self, plan: Plan) -> None:
        """What was here counts no more."""
        self.seated = None
        self._dealt.clear()
        self.deal(plan)

    def _keep(self, chunks: frozenset[int]) -> None:
        for parameter, state in self._states():
            cut = self.cut_of(parameter)
            if cut is not None:
                keep_runs(state, parameter, cut.runs(chunks))

    def _states(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for _, optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter in optimizer.state:
                        yield parameter, optimizer.state[parameter]


def _to_cut(pipe: Pipeline, optimizers: Sequence[tuple[str, Optimizer]]) -> Iterator[tuple[str, int, int]]:
    updated = {
        id(parameter)
        for _, optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in pipe.named_parameters():
        if id(parameter) not in updated or not parameter.requires_grad:
            continue
        if parameter.numel() == 0 or not parameter.is_contiguous():
            lacks = "no elements" if parameter.numel() == 0 else f"the strides {parameter.stride()}"
            raise ValueError(
                f"pipeline(shard_optimizer=True): parameter {name} of shape {tuple(parameter.shape)} has {lacks}, and "
                "can't be cut into chunks: make it contiguous and not empty, or leave shard_optimizer out"
            )
        yield name, parameter.numel(), parameter.element_size()
