"""In what the structure and the plain values of two states differ, by the names that their users know. No torch.

    model.dropout.p, model.1.training               attributes of a module
    model.0.weight.requires_grad
    model.norm.running_mean                         a tensor that one lacks, or another type or shape
    optimizer.param_groups                          how many there are; only those that both have are compared further
    optimizer.param_groups.0.lr, ema.decay          plain values

The bytes of tensors are not compared, nor the numbers that they have in a skeleton.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from snapshot.skeleton import TensorSpec
from snapshot.state_tree import Leaf, comparable, flags, places, spelling, tree_of
from snapshot.tree import Json


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Values as in Python; of a tensor a Leaf that says type and shape; ABSENT where one of the two has none."""

    name: str
    one: Any
    other: Any


_Facts = dict[object, tuple[str, Any]]
"""By what identifies it: name and value."""


def differences(
    one: Mapping[str, Json],
    other: Mapping[str, Json],
    tensors: Sequence[TensorSpec],
    other_tensors: Sequence[TensorSpec],
) -> Iterator[Difference]:
    """one, other: the objects of two skeletons, or the same few of each; then the tensors of both skeletons."""
    one, other = comparable(one, other), comparable(other, one)
    side, other_side = _Side(one, tensors), _Side(other, other_tensors)
    for name in sorted(one.keys() | other.keys()):
        kind, other_kind = _kind(one.get(name)), _kind(other.get(name))
        if kind != other_kind:
            yield Difference(name=name, one=kind, other=other_kind)
            continue
        node, other_node = one[name][kind], other[name][kind]  # type: ignore[index]
        if kind == "optimizer":
            yield from _compared(*_optimizers(name, (side, node), (other_side, other_node)))
        else:
            yield from _compared(side.facts(name, kind, node), other_side.facts(name, kind, other_node))


def _kind(structure: Any) -> Any:
    return ABSENT if structure is None else next(iter(structure))


def _compared(one: _Facts, other: _Facts) -> Iterator[Difference]:
    for key in one | other:
        name, ours = one.get(key, ("", ABSENT))
        other_name, theirs = other.get(key, (name, ABSENT))
        if ABSENT not in (ours, theirs) and spelling(ours) == spelling(theirs):
            continue
        if not _is_told_by_items(ours, other, other_name) and not _is_told_by_items(theirs, one, other_name):
            yield Difference(name=name or other_name, one=ours, other=theirs)


def _is_told_by_items(value: Any, others: _Facts, name: str) -> bool:
    """An empty container where the other has items, each with a name of its own."""
    return value in ({}, [], ()) and any(each.startswith(f"{name}.") for each, _ in others.values())


class _Side:
    """The names and values of one of the two."""

    def __init__(self, objects: Mapping[str, Json], tensors: Sequence[TensorSpec]) -> None:
        self._tensors = tensors
        self._owners: dict[int, str] = {}
        for place in places(tree_of(objects, everything=True)):
            if place.tensor is not None:
                self._owners.setdefault(place.tensor, place.name)

    def facts(self, name: str, kind: str, node: Any) -> _Facts:
        facts: _Facts = {
            place.path: (place.name, self._shown(place.name, place.value))
            for place in places(tree_of({name: {kind: node}}, everything=True))
        }
        return facts | {place.path: (place.name, place.value) for place in flags({name: {kind: node}})}

    def members(self, group: Any) -> list[Any]:
        """By name, or by shape those that no module has."""
        return [self._owners.get(entry.get("parameter"), entry["shape"]) for entry in group["parameters"]]

    def _shown(self, name: str, value: Any) -> Any:
        if not isinstance(value, Leaf) or value.tensor is None:
            return value
        spec, owner = self._tensors[value.tensor], self._owners[value.tensor]
        words = [f"{spec.dtype} {list(spec.shape)}"]
        if spec.order != tuple(range(len(spec.shape))):
            words.append(f"axes in memory {list(spec.order)}")
        words += [] if spec.device == "cpu" else [f"on {spec.device}"]
        words += [] if spec.shard is None else [f"a shard of {spec.shard}"]
        words += [] if owner == name else [f"shared with {owner}"]
        return Leaf(value.tag, ", ".join(words))


def _optimizers(name: str, *sides: tuple[_Side, Any]) -> Iterator[_Facts]:
    """The groups that both have. From where their members differ no state of these, which goes by their numbers."""
    pairs = list(zip(*([side.members(group) for group in node["groups"]] for side, node in sides), strict=False))
    alike = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    for which, (side, node) in enumerate(sides):
        groups = [
            {**group, "parameters": group["parameters"] if number < alike else []}
            for number, group in enumerate(node["groups"][: len(pairs)])
        ]
        facts = side.facts(name, "optimizer", {**node, "groups": groups})
        for number, pair in enumerate(pairs):
            facts[name, "param_groups", number, "params"] = f"{name}.param_groups.{number}.params", pair[which]
        yield {"count": (f"{name}.param_groups", len(node["groups"])), **facts}
