"""What is computed: a state that depends on every value of every step, so that any mistake shows.

A state is kept by layer, and beside the layers there is what belongs to none. Each layer has its own sums of all
micro-batches; what all of them come to, the outcome of a step, goes into every layer's next state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from snapshot.core.digest import StatePart, put_together

State = dict[int, int]
"""By layer."""
Held = tuple[tuple[int, int], ...]
"""The same as a value: what somebody has written down."""
NOBODYS = -1
"""In the place of a layer: what belongs to none."""
NO_VALUE = -2
"""Of what could not be read, or was read in several ways."""
DIGEST_BYTES = 16


class Complete(NamedTuple):
    """The complete result of a step: the sums of a rank's layers, and what all layers' sums come to."""

    step: int
    sums: Mapping[int, int]
    outcome: int
    generation: int
    """In which all members had the sums of their stage."""


def state_at_start(layers: int) -> State:
    return {layer: 20_250_101 + layer for layer in range(NOBODYS, layers)}


def leaf_values(state: State, step: int, leaf: int, layers: Iterable[int]) -> dict[int, int]:
    """By layer."""
    return {layer: hash((state[layer], step, leaf, layer)) for layer in layers}


def sums_of(values: Mapping[int, Mapping[int, int]]) -> dict[int, int]:
    """By layer, from the values of all leaves, by leaf."""
    layers = {layer for each in values.values() for layer in each}
    return {layer: hash(tuple((leaf, values[leaf][layer]) for leaf in sorted(values))) for layer in sorted(layers)}


def outcome_of(sums: Mapping[int, int]) -> int:
    """Of a step, from all layers' sums."""
    return hash(tuple(sorted(sums.items())))


def next_state(state: State, result: Complete) -> State:
    """Of those layers of which the result has sums."""
    step, sums, outcome, _ = result
    nobodys = hash((state[NOBODYS], step, outcome))
    return {NOBODYS: nobodys} | {layer: hash((state[layer], step, sums[layer], outcome)) for layer in sums}


def written(state: State) -> Held:
    return tuple(sorted(state.items()))


def read(parts: Iterable[Held]) -> State:
    """Put together again; what parts disagree about is NO_VALUE."""
    found: State = {}
    for part in parts:
        for layer, value in part:
            found[layer] = value if found.get(layer, value) == value else NO_VALUE
    return found


def part_of(state: State, layers: Sequence[int], count: int) -> StatePart:
    """What a rank that answers for these layers tells of a state with so many. Each is a byte, for that matter."""
    places = [layer - NOBODYS for layer in layers]
    return StatePart(
        skeleton=b"same",
        state_bytes=count - NOBODYS,
        ranges=tuple((place, place + 1) for place in places),
        digests=tuple(state[layer].to_bytes(DIGEST_BYTES, signed=True) for layer in layers),
    )


def digest_of(state: State, count: int) -> str:
    """Of a state with so many layers."""
    return put_together([part_of(state, range(NOBODYS, count), count)])
