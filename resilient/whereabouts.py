"""Where in a pipeline's state each layer's bytes lie, and which of them a rank holds and captures.

What belongs to no layer (schedulers, `run.state`, the position in the data) is on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from snapshot.core.chunks import chunk_ends, share_of
from snapshot.core.ranges import Range, Ranges, merged
from snapshot.skeleton import TensorSpec

from .core.plan import Plan, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    layers: Mapping[str, tuple[int, ...]]
    """By the name of a tensor, up to the first "[", the layers that use it; the first of them counts as its own."""

    def held(self, specs: Sequence[TensorSpec], layers: range) -> Ranges:
        """The bytes that a rank which holds these layers has."""
        return merged(
            (start, stop)
            for spec, start, stop in _spans(specs)
            if not (users := self._users(spec)) or any(user in layers for user in users)
        )

    def groups(self, specs: Sequence[TensorSpec]) -> dict[tuple[int, ...], Ranges]:
        """By the layers that use them, all tensors' bytes: those of a group are always held together."""
        found: dict[tuple[int, ...], list[Range]] = {}
        for spec, start, stop in _spans(specs):
            found.setdefault(self._users(spec), []).append((start, stop))
        return {users: merged(ranges) for users, ranges in sorted(found.items())}

    def captured(self, specs: Sequence[TensorSpec], plan: Plan, rank: int) -> Ranges:
        """The bytes that this rank captures: of all ranks together everything, once. Whole chunks."""
        stage = plan.stage_of(rank)
        assert stage is not None
        chunks = list(self._chunks_of(specs, stage))
        ends, total = [], 0
        for start, stop in chunks:
            total += stop - start
            ends.append(total)
        first, last = share_of(ends, stage.ranks.index(rank), len(stage.ranks))
        return merged(chunk for chunk, end in zip(chunks, ends, strict=True) if first < end <= last)

    def _chunks_of(self, specs: Sequence[TensorSpec], stage: Stage) -> Iterator[Range]:
        for spec, begin, _ in _spans(specs):
            users = self._users(spec)
            if stage.first <= (users[0] if users else 0) < stage.stop:
                former = begin
                for end in chunk_ends([(spec.nbytes // spec.itemsize, spec.itemsize)]):
                    yield former, begin + end
                    former = begin + end

    def _users(self, spec: TensorSpec) -> tuple[int, ...]:
        return self.layers.get(spec.name.partition("[")[0], ())


def _spans(specs: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, int, int]]:
    at = 0
    for spec in specs:
        yield spec, at, at + spec.nbytes
        at += spec.nbytes
