"""In which order a rank of a pipeline goes forward and backward through its micro-batches. Pure.

There is no fixed order: whenever a rank is free it does what is ready by then, by these rules.

    1f1b    backward first; forward only as long as few are under way
    gpipe   forward first; all of them may be under way

How many may be under way is what keeps memory small. With one rank per stage it is the number of stages from this
one on (D. Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", ICML 2021, section 3.2), and one more,
which covers the time that its gradient is on its way. With uneven stages a rank feeds more or fewer ranks than one.

It always comes to an end, whatever ranks own: the last stage goes backward at once after forward, so what is under
way there gets finished, hence also one stage before, and so on. A micro-batch that a rank takes over from one that
has died is a micro-batch like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["1f1b", "gpipe"]
KINDS: tuple[Kind, ...] = ("1f1b", "gpipe")


@dataclass(frozen=True, slots=True)
class Forward:
    leaf: int


@dataclass(frozen=True, slots=True)
class Backward:
    leaf: int


Action = Forward | Backward


def under_way_limit(kind: Kind, stage: int, ranks: Sequence[int], micro_batches: int) -> int:
    """How many micro-batches a rank of this stage may have gone forward through and not yet backward.

    ranks: of each stage, how many there are.
    """
    if kind == "gpipe":
        return micro_batches
    if stage == len(ranks) - 1:
        return 1
    return -(-sum(ranks[stage:]) // ranks[stage]) + 1


def turns_of(owned: Sequence[Sequence[Sequence[int]]], micro_batches: int) -> list[float]:
    """In which order micro-batches go through all stages: by how far each is along its owner's own ones, where most
    ranks share a stage. So all ranks have something to do from the beginning: each has a run of micro-batches, and in
    the order of their numbers whoever has the last run would wait for all others.

    owned: by stage, by rank, its micro-batches.
    """
    turns = [0.0] * micro_batches
    for leaves in max(owned, key=len):
        for place, leaf in enumerate(sorted(leaves)):
            turns[leaf] = place / len(leaves)
    return turns


def choose(
    kind: Kind,
    limit: int,
    *,
    fresh: Collection[int],
    under_way: Collection[int],
    inputs: Collection[int],
    gradients: Collection[int],
    turns: Sequence[float],
) -> Action | None:
    """What to do now; None while nothing is ready.

    fresh: own micro-batches that forward has not begun. under_way: those that it has, and backward has not. inputs,
    gradients: micro-batches of which what forward, or backward, needs is here. turns: see `turns_of`.
    """

    def turn(leaf: int) -> tuple[float, int]:
        return turns[leaf], leaf

    back = min((leaf for leaf in under_way if leaf in gradients), key=turn, default=None)
    ahead = min((leaf for leaf in fresh if leaf in inputs), key=turn, default=None)
    if len(under_way) >= limit:
        ahead = None
    if back is not None and (kind == "1f1b" or ahead is None):
        return Backward(back)
    return None if ahead is None else Forward(ahead)
