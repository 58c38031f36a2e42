"""Whose state is another than the others', and whom to believe. Pure.

All ranks hold the same state; each brings a digest of it into the exchange. Where one differs, something has changed
bits without anybody's doing: memory, a processor, a driver. What such a rank has computed since the last comparison is
in everybody's sums, so all go back to before that; whoever stands against a majority is replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from .lane import NOBODYS
from .plan import Plan
from .seat import Rollback


def odd_ones(digests: Sequence[int]) -> tuple[int, ...]:
    """By rank: those whose digest is not that of the majority. None of them if there is no majority."""
    counted = Counter(digest for digest in digests if digest != NOBODYS)
    if not counted:
        return ()
    ((most, votes),) = counted.most_common(1)
    if 2 * votes <= counted.total():
        return ()
    return tuple(rank for rank, digest in enumerate(digests) if digest not in (NOBODYS, most))


def odd_of_stages(plan: Plan, digests: Sequence[int]) -> tuple[int, ...]:
    """The same stage by stage: ranks of different stages hold different parts of the state."""
    if not plan.stages:
        return odd_ones(digests)
    odd = [stage.ranks[place] for stage in plan.stages for place in odd_ones([digests[rank] for rank in stage.ranks])]
    return tuple(sorted(odd))


def rollback_after(plan: Plan, step: int, digests: Sequence[int], verified: int) -> Rollback:
    """What all ranks ask for, who know the same. verified: newest step at whose start all held the same state."""
    odd = odd_of_stages(plan, digests)
    if odd:
        what = f"{_named(plan, odd)} had another state at the start of step {step} than the majority of ranks"
    else:
        what = f"the ranks' states at the start of step {step} differ, and none is that of a majority"
    return _rollback(plan, what, odd, verified)


def rollback_after_move(plan: Plan, step: int, differing: Mapping[str, Mapping[int, int]], verified: int) -> Rollback:
    """The same where it is found at the boundary before this step, as layers are about to move. differing: in words
    what differs, and by rank of those that had it before, the digest of it."""
    odd = tuple(sorted({rank for digests in differing.values() for rank in _odd_holders(digests)}))
    what = ", ".join(differing)
    if odd:
        found = (
            f"{_named(plan, odd)} had other bytes of {what} at the start of step {step} than the majority that had it"
        )
    else:
        holders = ", ".join(str(rank) for rank in sorted({rank for digests in differing.values() for rank in digests}))
        found = (
            f"ranks {holders} had different bytes of {what} at the start of step {step}, and none those of a majority"
        )
    return _rollback(plan, found, odd, verified)


def _odd_holders(digests: Mapping[int, int]) -> list[int]:
    ranks = sorted(digests)
    return [ranks[place] for place in odd_ones([digests[rank] for rank in ranks])]


def _named(plan: Plan, odd: Sequence[int]) -> str:
    return ", ".join(f"rank {rank} (node {plan.places[rank].node[:8]})" for rank in odd)


def _rollback(plan: Plan, what: str, odd: Sequence[int], verified: int) -> Rollback:
    return Rollback(
        back_to=verified,
        skip_from=0,
        skip_to=-1,
        why=f"{what}, though nothing had changed it: suspect memory or processor",
        suspects=tuple(plan.members[rank] for rank in odd),
    )
