"""In what two checkpoints differ: tensors, their bits, and plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snapshot.state_tree import Path, Place, comparable, flags, places, spelling, tree_of
from snapshot.stored import Stored
from snapshot.tree import Json

from .loading import shown_objects

if TYPE_CHECKING:
    from snapshot.compare import BitDifference


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """What stands in one alone, is laid out differently, has other bits, or is another value.

    Of tied tensors the first is named. compared: whose bits were, by their numbers in both.
    """

    only_in_one: list[Place] = field(default_factory=list)
    only_in_other: list[Place] = field(default_factory=list)
    layouts: list[tuple[Place, str, str]] = field(default_factory=list)
    tensors: list[tuple[Place, BitDifference]] = field(default_factory=list)
    values: list[tuple[Place, Place]] = field(default_factory=list)
    compared: dict[tuple[int, int], Place] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        return not (self.only_in_one or self.only_in_other or self.layouts or self.tensors or self.values)


def layout_of(stored: Stored, place: Place) -> str:
    if place.tensor is None:
        return f"a {type(place.value).__name__}"
    spec = stored.skeleton.tensors[place.tensor]
    shard = f", shard: {spec.shard}" if spec.shard is not None else ""
    return f"{spec.dtype} {list(spec.shape)}{shard}"


def differences_of(one: Stored, other: Stored, progress: Callable[[int, int], None]) -> Differences:
    """Streams tensor by tensor. progress: called with bytes compared and bytes in all. Raises as `Stored.read`."""
    objects, others = shown_objects(one), shown_objects(other)
    ours, theirs = _by_path(comparable(objects, others)), _by_path(comparable(others, objects))
    found = Differences(
        only_in_one=[place for path, place in ours.items() if path not in theirs],
        only_in_other=[place for path, place in theirs.items() if path not in ours],
    )
    for path, place in ours.items():
        match = theirs.get(path)
        if match is None:
            continue
        if place.tensor is None and match.tensor is None:
            if spelling(place.value) != spelling(match.value):
                found.values.append((place, match))
        elif place.tensor is None or match.tensor is None or layout_of(one, place) != layout_of(other, match):
            found.layouts.append((place, layout_of(one, place), layout_of(other, match)))
        else:
            found.compared.setdefault((place.tensor, match.tensor), place)
    found.tensors.extend(_tensors(one, other, found.compared, progress))
    return found


def _tensors(
    one: Stored, other: Stored, pairs: dict[tuple[int, int], Place], progress: Callable[[int, int], None]
) -> Iterator[tuple[Place, BitDifference]]:
    from snapshot.compare import compare  # torch

    specs = one.skeleton.tensors
    done, total = 0, sum(specs[number].nbytes for number, _ in pairs)
    for (number, other_number), place in sorted(pairs.items(), key=lambda item: item[0]):
        difference = compare(one, number, other, other_number)
        if difference.bits:
            yield place, difference
        done += specs[number].nbytes
        progress(done, total)


def _by_path(objects: Mapping[str, Json]) -> dict[Path, Place]:
    return {place.path: place for place in (*places(tree_of(objects, everything=True)), *flags(objects))}
