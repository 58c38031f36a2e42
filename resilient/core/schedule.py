"""In which order a rank of a pipeline goes forward and backward through its micro-batches. Pure.

There is no fixed order: whenever a rank is free it does what is ready by then, forward as long as it may have more
micro-batches under way, and backward otherwise. So others have work as early as can be. How many may be under way is
what keeps memory small.

    1f1b    as many as keep all stages from this one on busy; from then on it goes forward and backward in turn
    gpipe   all of them

With one rank per stage it is the number of stages from this one on that keeps them busy (D. Narayanan et al.,
"Memory-Efficient Pipeline-Parallel DNN Training", ICML 2021, section 3.2), and one more, which covers the time that its
gradient is on its way. With uneven stages a rank feeds more or fewer ranks than one, and less regularly; and one with
more layers than those after it need not wait at a step's start, if it may go forward until the first gradient is back.

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
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Forward:
    leaf: int


@dataclass(frozen=True, slots=True)
class Backward:
    leaf: int


Action = Forward | Backward


def under_way_limit(kind: Kind, sizes: Sequence[tuple[int, int]], micro_batches: int) -> int:
    """How many micro-batches a rank of this stage may have gone forward through and not yet backward.

    sizes: numbers of layers and of ranks, of this stage and of each that follows. Where they differ it is twice as
    many: with fewer, half of the time of some splits was lost to waiting, with more nothing was won.
    """
    if kind == "gpipe":
        return micro_batches
    if len(sizes) == 1:
        return 1
    ahead = sum(ranks for _, ranks in sizes) * (1 if len(set(sizes)) == 1 else 2)
    return -(-ahead // sizes[0][1]) + 1


def turns_of(micro_batches: int) -> list[int]:
    """In which order micro-batches go through all stages, the first ones 0: by multiples of the golden section.

    At any time those that have had their turn lie evenly among all (V. T. Sos, "On the distribution mod 1 of the
    sequence n alpha", 1958). Each rank of each stage has a run of micro-batches, so each has had its part of them,
    however stages differ. In the order of their numbers whoever has the last run would wait for all others.
    """
    return sorted(range(micro_batches), key=lambda turn: turn * GOLDEN % 1.0)


def choose(
    limit: int,
    *,
    fresh: Collection[int],
    under_way: Collection[int],
    inputs: Collection[int],
    gradients: Collection[int],
    turns: Sequence[int],
) -> Action | None:
    """What to do now; None while nothing is ready.

    limit: see `under_way_limit`. fresh: own micro-batches that forward has not begun. under_way: those that it has, and
    backward has not. inputs, gradients: micro-batches of which what forward, or backward, needs is here. turns: see
    `turns_of`.
    """

    ahead = min((leaf for leaf in fresh if leaf in inputs), key=turns.__getitem__, default=None)
    if ahead is not None and len(under_way) < limit:
        return Forward(ahead)
    back = min((leaf for leaf in under_way if leaf in gradients), key=turns.__getitem__, default=None)
    return None if back is None else Backward(back)
