"""A skeleton as nested plain values: what the objects' `state_dict()` gave, with numbers instead of tensors.

    module      {path: tensor} of parameters and persistent buffers, and "..._extra_state"
    optimizer   {"state": {0: {...}}, "param_groups": [{..., "params": [0, 1]}]}, as torch has it
    dict        its values
    any other   what its state_dict() gave

Everything in it has a name, its path with dots: "model.norm.weight", "optimizer.state.0.exp_avg",
"optimizer.param_groups.0.lr". No torch: it is read in the blink of an eye.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, cast

import numpy as np

from snapshot.tree import Json, decode, encode, to_bytes

Path = tuple[object, ...]
Tree = dict[str, Any]

_DICTS = (dict, OrderedDict, Counter)


@dataclass(frozen=True, slots=True, repr=False)
class Leaf:
    """What takes torch or numpy to make a value of it; see `snapshot.capture`.

    tag: "tensor" or "array", then payload is the tensor's number in the skeleton; or "scalar", "size", "dtype", ...
    """

    tag: str
    payload: Any

    @property
    def tensor(self) -> int | None:
        return int(self.payload) if self.tag in ("tensor", "array") else None

    def __repr__(self) -> str:
        if self.tag == "scalar":
            dtype, data = self.payload
            return f"{np.frombuffer(bytes.fromhex(data), dtype)[0]!s}"
        return f"{self.tag} {self.payload}"


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor or a plain value. path: its keys and positions from the object's name on."""

    name: str
    path: Path
    value: Any

    @property
    def tensor(self) -> int | None:
        """Its number in the skeleton; None for a plain value."""
        return self.value.tensor if isinstance(self.value, Leaf) else None


def tree_of(objects: Mapping[str, Json], *, everything: bool = False) -> Tree:
    """objects: as in a skeleton. everything: also the buffers that a module's state_dict leaves out."""
    return {name: _object(structure, everything) for name, structure in objects.items()}


def _object(structure: Any, everything: bool) -> Any:
    ((kind, node),) = structure.items()
    match kind:
        case "module":
            return _module(node, everything)
        case "optimizer":
            return _optimizer(node)
        case "values" | "object":
            return _decoded(node)
    raise ValueError(f"skeleton: an object of kind {kind!r:.80}; a newer version of this package may have written it")


def _decoded(node: Json) -> Any:
    return decode(node, leaf=lambda tag, payload, _: Leaf(tag, payload))


def _module(node: Any, everything: bool) -> dict[str, Any]:
    state: dict[str, Any] = {path: Leaf("tensor", index) for path, index in node["parameters"]}
    for path, index, persistent in node["buffers"]:
        if index is not None and (persistent or everything):
            state[path] = Leaf("tensor", index)
    for path, extra in node["extra"]:
        state[f"{path}._extra_state" if path else "_extra_state"] = _decoded(extra)
    return state


def _optimizer(node: Any) -> dict[str, Any]:
    state: dict[Any, Any] = {}
    groups = []
    first = 0
    for group in node["groups"]:
        members = group["parameters"]
        for number, member in enumerate(members, first):
            if member["state"] is not None:
                state[number] = _decoded(member["state"])
        groups.append({**_decoded(group["values"]), "params": list(range(first, first + len(members)))})
        first += len(members)
    return {"state": state | _decoded(node["shared"]), "param_groups": groups}


def flags(objects: Mapping[str, Json]) -> list[Place]:
    """Of modules what no state_dict has: "model.0.weight.requires_grad", "model.dropout.p", buffers that are None.

    States of earlier versions have only the latter.
    """
    return [
        Place(f"{name}.{path}", (name, path), value)
        for name, structure in objects.items()
        for path, value in _flags(cast(Any, structure).get("module"))
    ]


def _flags(node: Any) -> Iterator[tuple[str, Any]]:
    if node is None:
        return
    yield from ((path, None) for path, index, _ in node["buffers"] if index is None)
    for path, _ in node["parameters"] if "frozen" in node else ():
        yield f"{path}.requires_grad", path not in node["frozen"]
    for path, attributes in node.get("attributes", ()):
        yield from ((f"{path}.{key}" if path else key, value) for key, value in _decoded(attributes).items())


def comparable(objects: Mapping[str, Json], others: Mapping[str, Json]) -> dict[str, Json]:
    """The objects without what the others lack of a module because an earlier version has stored them."""
    return {name: _comparable(structure, others.get(name)) for name, structure in objects.items()}


def _comparable(structure: Any, other: Any) -> Json:
    if other is None or "module" not in structure or "module" not in other:
        return cast(Json, structure)
    return {"module": {key: value for key, value in structure["module"].items() if key in other["module"]}}


def places(tree: Tree) -> list[Place]:
    """All tensors and plain values, in order. A list of plain values alone is one value."""
    found = list(_walk(tree, ()))
    names = Counter(name for name, _, _ in found)
    # {"a": {"b": 1}, "a.b": 2}: neither may stand for the other.
    return [
        Place(name if names[name] == 1 else f"{path[0]}{''.join(f'[{key!r}]' for key in path[1:])}", path, value)
        for name, path, value in found
    ]


def _walk(node: Any, path: Path) -> Iterator[tuple[str, Path, Any]]:
    if not _is_inner(node):
        yield ".".join(map(str, path)), path, node
        return
    for key, value in node.items() if type(node) in _DICTS else enumerate(node):
        yield from _walk(value, (*path, key))


def _is_inner(node: Any) -> bool:
    if type(node) in _DICTS:
        return bool(node)
    return type(node) in (list, tuple) and any(isinstance(item, Leaf | dict | list | tuple) for item in node)


def chosen(all_places: list[Place], names: Iterable[str]) -> list[Place]:
    """Those that the names stand for: of a tensor or value, of an object or anything within, or with unix wildcards.

    Raises ValueError for a name that stands for nothing.
    """
    keep: set[int] = set()
    for name in names:
        found = {number for number, place in enumerate(all_places) if _stands_for(name, place)}
        if not found:
            raise ValueError(f"names: nothing is called {name!r}; {_close(all_places, name)}")
        keep |= found
    return [all_places[number] for number in sorted(keep)]


def _stands_for(name: str, place: Place) -> bool:
    if place.name == name or place.name.startswith((f"{name}.", f"{name}[")):
        return True
    return fnmatchcase(place.name, name) or fnmatchcase(str(place.path[0]), name)


def _close(all_places: list[Place], name: str) -> str:
    objects = list(dict.fromkeys(str(place.path[0]) for place in all_places))
    close = get_close_matches(name, [*objects, *(place.name for place in all_places)], n=3)
    return f"close to it: {', '.join(close)}" if close else f"there are: {', '.join(objects)}"


def pruned(tree: Tree, keep: Iterable[Place]) -> Tree:
    """The tree with these places alone. A list of which some are left is a dict by their position in it."""
    return dict(_pruned(tree, (), {place.path for place in keep})) if keep else {}


def _pruned(node: Any, path: Path, keep: set[Path]) -> Any:
    if not _is_inner(node):
        return node if path in keep else None
    is_dict = type(node) in _DICTS
    items = node.items() if is_dict else enumerate(node)
    kept = {key: _pruned(value, (*path, key), keep) for key, value in items if _has(value, (*path, key), keep)}
    if is_dict:
        return type(node)(kept)
    return type(node)(kept.values()) if len(kept) == len(node) else kept


def _has(node: Any, path: Path, keep: set[Path]) -> bool:
    return any(inner in keep for _, inner, _ in _walk(node, path))


def filled(node: Any, value_of: Callable[[Leaf], Any]) -> Any:
    """The tree with values instead of leaves."""
    if isinstance(node, Leaf):
        return value_of(node)
    if not _is_inner(node):
        return node
    if type(node) in _DICTS:
        return type(node)({key: filled(value, value_of) for key, value in node.items()})
    return type(node)(filled(value, value_of) for value in node)


def spelling(value: Any) -> bytes:
    """Of a plain value: equal bits and types, equal bytes."""
    return to_bytes(encode(value, path="", leaf=_leaf))


def _leaf(_: str, value: object) -> tuple[str, Json] | None:
    return (value.tag, value.payload) if isinstance(value, Leaf) else None


def json_of(value: Any) -> Any:
    """A plain value for readers of JSON: as it is where JSON can say it exactly, else {kind: ...} as in a skeleton."""
    if value is None or type(value) in (bool, str, int):
        return value
    if type(value) is float and abs(value) < float("inf"):
        return value
    if type(value) is list:
        return list(map(json_of, value))
    if type(value) is tuple:
        return {"tuple": list(map(json_of, value))}
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: json_of(item) for key, item in value.items()}
    if isinstance(value, Leaf):
        return {value.tag: value.payload}
    return encode(value, path="", leaf=_leaf)
