"""The optimizer's step where its state is in shards: each rank of a stage updates its chunks, then all have all values.

The values go from process to process as parcels, and are kept by whoever they reach, so a broken link loses none of
them. They are copies: what the user does to a parameter after the step does not change what others are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from actors.post import Key, Parcel, Post

from .chunk_state import flat
from .chunked_step import in_chunks
from .core.shards import Run
from .shards import OptimizerShards, Seated
from .team import Team

UPDATED = 2
"""The last number of such a parcel's key; those of a step's micro-batches have 0 and 1."""

Part = tuple[Tensor, Run]


class StageUpdate:
    """One rank's; by the training thread."""

    def __init__(self, shards: OptimizerShards, team: Team, post: Post | None) -> None:
        self._shards, self._team, self._post = shards, team, post
        self._updates = 0
        """Of this step so far."""

    def begin_step(self) -> None:
        self._updates = 0

    def step(self, optimizer: Optimizer, original: Callable[[], Any]) -> Any:
        """original: the optimizer's own step. Returns when all parameters of the stage have their new values, or when
        the step has been given up; what it says then counts for nothing."""
        updated = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        with in_chunks(optimizer, self._shards.runs):
            result = original()
        self._exchange(updated)
        return result

    def _exchange(self, updated: Sequence[Tensor]) -> None:
        seated = self._shards.seated
        assert seated is not None
        if not seated.others:
            return
        post = self._post
        assert post is not None
        self._updates += 1
        self._give(seated, post, updated)
        coming = {
            self._key(seated, member): parts
            for member in seated.others
            if (parts := list(self._parts(updated, seated.dealt.of(member))))
        }
        if self._team.wait_for(lambda: all(post.get(key) is not None for key in coming)):
            for key, parts in coming.items():
                parcel = post.get(key)
                assert parcel is not None, key
                _write(parcel, parts)

    def _give(self, seated: Seated, post: Post, updated: Sequence[Tensor]) -> None:
        parts = list(self._parts(updated, seated.owned))
        if not parts:
            return
        values = [
            torch.cat([flat(parameter)[start:stop] for parameter, (start, stop) in group]) for group in _by_dtype(parts)
        ]
        parcel = Parcel(tensors=tuple(values), marks=(0,) * len(values))
        for member in seated.others:
            address = seated.plan.places[seated.plan.rank_of(member)].address
            post.send(member, (address.host, address.post), self._key(seated, seated.member), parcel)

    def _key(self, seated: Seated, sender: int) -> Key:
        return (seated.plan.since, self._team.step, self._updates, sender, UPDATED)

    def _parts(self, updated: Sequence[Tensor], chunks: frozenset[int]) -> Iterator[Part]:
        for parameter in updated:
            cut = self._shards.cut_of(parameter)
            for run in cut.runs(chunks) if cut is not None else ():
                yield parameter, run


def _by_dtype(parts: Sequence[Part]) -> list[list[Part]]:
    found: dict[torch.dtype, list[Part]] = {}
    for part in parts:
        found.setdefault(part[0].dtype, []).append(part)
    return list(found.values())


def _write(parcel: Parcel, parts: Sequence[Part]) -> None:
    for values, group in zip(parcel.tensors, _by_dtype(parts), strict=True):
        pieces = torch.split(values, [stop - start for _, (start, stop) in group])
        for (parameter, (start, stop)), piece in zip(group, pieces, strict=True):
            flat(parameter)[start:stop].copy_(piece)
