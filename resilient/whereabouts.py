"""Where in a pipeline's state each layer's bytes lie, and which of them a rank holds and captures.

What belongs to no layer (schedulers, `run.state`, the position in the data) is on every rank. Where optimizer state is
in shards, it is not where its layers are, but where its chunks are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from snapshot.core.chunks import chunk_ends, share_of
from snapshot.core.ranges import Range, Ranges, merged
from snapshot.skeleton import TensorSpec

from .core.plan import Plan, Stage
from .core.shards import Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    layers: Mapping[str, tuple[int, ...]]
    """By the name of a tensor, up to the first "[", the layers that use it; the first of them counts as its own."""

    cuts: Mapping[str, Cut] = field(default_factory=dict)
    """By the same names, of what optimizers keep in shards, how the parameter is cut."""

    def held(self, specs: Sequence[TensorSpec], layers: range) -> Ranges:
        """The bytes that a rank which holds these layers has, but for what is in shards."""
        return merged(
            (start, stop)
            for spec, start, stop in _spans(specs)
            if self._cut(spec) is None and (not (users := self._users(spec)) or any(user in layers for user in users))
        )

    def owned(self, specs: Sequence[TensorSpec], chunks: Collection[int]) -> Ranges:
        """The bytes of what is in shards that a rank which owns these chunks has. Whole chunks."""
        return merged(
            (start, stop)
            for spec, begin, _ in _spans(specs)
            if (cut := self._cut(spec)) is not None
            for start, stop, numbers in _in_chunks(spec, begin, cut)
            if any(number in chunks for number in numbers)
        )

    def groups(self, specs: Sequence[TensorSpec]) -> dict[tuple[int, ...], Ranges]:
        """By the layers that use them, the bytes of all tensors but what is in shards: those of a group are always
        held together."""
        found: dict[tuple[int, ...], list[Range]] = {}
        for spec, start, stop in _spans(specs):
            if self._cut(spec) is None:
                found.setdefault(self._users(spec), []).append((start, stop))
        return {users: merged(ranges) for users, ranges in sorted(found.items())}

    def for_updates(self, specs: Sequence[TensorSpec]) -> Ranges:
        """The bytes of what optimizers keep of the layers' parameters: computing needs none of it."""
        return merged((start, stop) for spec, start, stop in _spans(specs) if "[" in spec.name and self._users(spec))

    def captured(
        self, specs: Sequence[TensorSpec], plan: Plan, rank: int, owners: Mapping[int, int] | None = None
    ) -> Ranges:
        """The bytes that this rank captures: of all ranks together everything, once. Whole chunks.

        owners: of each chunk that the rank's stage needs, the rank that owns it, if anything is in shards.
        """
        stage = plan.stage_of(rank)
        assert stage is not None
        chunks = list(self._chunks_of(specs, stage))
        ends, total = [], 0
        for start, stop in chunks:
            total += stop - start
            ends.append(total)
        first, last = share_of(ends, stage.ranks.index(rank), len(stage.ranks))
        shared = [chunk for chunk, end in zip(chunks, ends, strict=True) if first < end <= last]
        return merged((*shared, *self._captured_shards(specs, stage, rank, owners or {})))

    def _captured_shards(
        self, specs: Sequence[TensorSpec], stage: Stage, rank: int, owners: Mapping[int, int]
    ) -> Iterator[Range]:
        for spec, begin, _ in _spans(specs):
            cut = self._cut(spec)
            if cut is not None and self._is_in(spec, stage):
                for start, stop, numbers in _in_chunks(spec, begin, cut):
                    if owners[numbers[0]] == rank:
                        yield start, stop

    def _chunks_of(self, specs: Sequence[TensorSpec], stage: Stage) -> Iterator[Range]:
        """Of what is not in shards."""
        for spec, begin, _ in _spans(specs):
            if self._cut(spec) is None and self._is_in(spec, stage):
                former = begin
                for end in chunk_ends([(spec.nbytes // spec.itemsize, spec.itemsize)]):
                    yield former, begin + end
                    former = begin + end

    def is_common(self, spec: TensorSpec) -> bool:
        """Whether all ranks of a stage that holds it have the same of it: it is not in shards."""
        return self._cut(spec) is None

    def _is_in(self, spec: TensorSpec, stage: Stage) -> bool:
        users = self._users(spec)
        return stage.first <= (users[0] if users else 0) < stage.stop

    def _users(self, spec: TensorSpec) -> tuple[int, ...]:
        return self.layers.get(spec.name.partition("[")[0], ())

    def _cut(self, spec: TensorSpec) -> Cut | None:
        place, is_state, _ = spec.name.partition("[")
        return self.cuts.get(place) if is_state else None


def _in_chunks(spec: TensorSpec, begin: int, cut: Cut) -> Iterator[tuple[int, int, range]]:
    """Bytes, and the chunks with whose owners they are: of a counter all that the parameter has."""
    if spec.nbytes != cut.elements * spec.itemsize:
        yield begin, begin + spec.nbytes, cut.numbers
        return
    for number in cut.numbers:
        first, stop = cut.span(number)
        yield begin + first * spec.itemsize, begin + stop * spec.itemsize, range(number, number + 1)


def _spans(specs: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, int, int]]:
    at = 0
    for spec in specs:
        yield spec, at, at + spec.nbytes
        at += spec.nbytes
