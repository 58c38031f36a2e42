"""Chunks of optimizer state: where parameters are cut, and which rank of its stage owns which chunk. Pure.

The cuts are those of snapshots, so a chunk of a state tensor, of its parameter and of a snapshot are the same elements.
Chunks are numbered through all parameters of the model in their order, on all ranks alike. A parameter that several
stages hold is updated in each of them, so its chunks have an owner in each.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .chunks import chunk_owners
from .plan import Plan, Stage

Run = tuple[int, int]
"""Elements first..stop-1 of a parameter, in the order in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One parameter in chunks."""

    first: int
    """The number of its first chunk."""
    elements: int
    itemsize: int
    chunk_elements: int

    @property
    def numbers(self) -> range:
        return range(self.first, self.first - (-self.elements // self.chunk_elements))

    def span(self, number: int) -> Run:
        start = (number - self.first) * self.chunk_elements
        return start, min(start + self.chunk_elements, self.elements)

    def runs(self, chunks: Collection[int]) -> tuple[Run, ...]:
        """What these chunks, among which may be others', are of it; those that follow each other as one."""
        found: list[Run] = []
        for number in self.numbers:
            if number in chunks:
                start, stop = self.span(number)
                if found and found[-1][1] == start:
                    start = found.pop()[0]
                found.append((start, stop))
        return tuple(found)


def cuts_of(parameters: Iterable[tuple[str, int, int]], chunk_elements: int) -> dict[str, Cut]:
    """parameters: name, elements (at least one) and bytes per element of each, in order."""
    assert chunk_elements % 1024 == 0 < chunk_elements, chunk_elements
    cuts: dict[str, Cut] = {}
    first = 0
    for name, elements, itemsize in parameters:
        assert elements > 0, name
        cuts[name] = Cut(first=first, elements=elements, itemsize=itemsize, chunk_elements=chunk_elements)
        first = cuts[name].numbers.stop
    return cuts


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealt:
    """Who owns what under a plan."""

    owners: tuple[Mapping[int, int], ...]
    """By stage: of each chunk that it needs, the member."""

    def of(self, member: int) -> frozenset[int]:
        return frozenset(chunk for owners in self.owners for chunk, owner in owners.items() if owner == member)


def deal(
    plan: Plan,
    cuts: Mapping[str, Cut],
    needed: Sequence[Collection[str]],
    held: Sequence[Collection[int]] = (),
) -> Dealt:
    """needed: by stage, the parameters that it holds. held: by rank the chunks whose state it has; none of them counts
    if that is left out. Members that are to own nothing (`Plan.emptied`) do so if their stage has others."""
    return Dealt(
        owners=tuple(
            _dealt_in(plan, stage, cuts, names, held) for stage, names in zip(plan.stages, needed, strict=True)
        )
    )


def _dealt_in(
    plan: Plan, stage: Stage, cuts: Mapping[str, Cut], names: Collection[str], held: Sequence[Collection[int]]
) -> dict[int, int]:
    ranks = [rank for rank in stage.ranks if plan.members[rank] not in plan.emptied] or list(stage.ranks)
    numbers, sizes = [], []
    for name, cut in cuts.items():
        for number in cut.numbers if name in names else ():
            start, stop = cut.span(number)
            numbers.append(number)
            sizes.append((stop - start) * cut.itemsize)
    former = [next((rank for rank in ranks if number in held[rank]), None) for number in numbers] if held else []
    owners = chunk_owners(sizes, ranks, former)
    return {number: plan.members[owner] for number, owner in zip(numbers, owners, strict=True)}


# What ranks tell each other of what they hold


def spelled_chunks(chunks: Collection[int]) -> bytes:
    return json.dumps([run for first, stop in _runs(sorted(chunks)) for run in (first, stop)]).encode()


def chunks_from(text: bytes) -> frozenset[int]:
    cuts = json.loads(text)
    return frozenset(number for at in range(0, len(cuts), 2) for number in range(cuts[at], cuts[at + 1]))


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = None
    for place, number in enumerate(numbers):
        first = number if first is None else first
        if place + 1 == len(numbers) or numbers[place + 1] != number + 1:
            yield first, number + 1
            first = None
