"""A tree of Python values as JSON, and back, without pickle: loading it runs no code.

Every JSON object has exactly one key, its tag; lists, strings, booleans, None and 64-bit integers stand for
themselves. What has no place in JSON (tensors, arrays) is left to the caller's `leaf` functions.

Bits survive: floats are written in hexadecimal, NaNs with their payload, dicts keep their order and the types
of their keys. Only exact types are accepted, because a subclass would silently come back as its base.
Containers referenced twice come back as two.
"""

import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json] | None"

EncodeLeaf: TypeAlias = Callable[[str, object], "tuple[str, Json] | None"]
"""(path, value) -> (tag, payload), or None if it does not know the type."""

DecodeLeaf: TypeAlias = Callable[[str, Json, object], object]
"""(tag, payload, what stands at this place in the current tree or None) -> value."""

MAX_DEPTH = 100

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_SETS: dict[type, str] = {set: "set", frozenset: "frozenset"}
_TAG_TYPES = {tag: kind for kind, tag in (_MAPPINGS | _SETS).items()}


def to_bytes(node: Json) -> bytes:
    """The one canonical spelling of a JSON value: equal values, equal bytes."""
    return json.dumps(node, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def encode(value: object, *, path: str, leaf: EncodeLeaf, depth: int = 0) -> Json:
    """The JSON form of a tree.

    path: where the value stands, for messages, e.g. "scheduler['milestones']".
    Raises TypeError, naming path, type and remedy, for a value that can't be expressed.
    """
    if depth > MAX_DEPTH:
        raise TypeError(f"{path}: nested deeper than {MAX_DEPTH} levels, or contains itself; flatten it")
    kind = type(value)
    if kind in _MAPPINGS:
        assert isinstance(value, dict)
        items: list[Json] = [
            [
                _encode_key(key, path=path, depth=depth + 1),
                encode(item, path=f"{path}[{key!r}]", leaf=leaf, depth=depth + 1),
            ]
            for key, item in value.items()
        ]
        return {_MAPPINGS[kind]: items}
    if kind is list or kind is tuple:
        assert isinstance(value, list | tuple)
        elements = [
            encode(item, path=f"{path}[{position}]", leaf=leaf, depth=depth + 1) for position, item in enumerate(value)
        ]
        return elements if kind is list else {"tuple": elements}
    if kind in _PLAIN or kind in _SETS:
        return _encode_key(value, path=path, depth=depth)
    known = leaf(path, value)
    if known is None:
        raise _refusal(path, kind)
    tag, payload = known
    return {tag: payload}


def _encode_key(value: object, *, path: str, depth: int) -> Json:
    """What may be a key or an element of a set; sets too, whose elements are sorted by their spelling."""
    kind = type(value)
    if kind in _SETS and depth <= MAX_DEPTH:
        assert isinstance(value, set | frozenset)
        elements = [_encode_key(element, path=path, depth=depth + 1) for element in value]
        return {_SETS[kind]: sorted(elements, key=to_bytes)}
    if kind is tuple and depth <= MAX_DEPTH:
        assert isinstance(value, tuple)
        return {"tuple": [_encode_key(element, path=path, depth=depth + 1) for element in value]}
    if kind not in _PLAIN:
        raise _refusal(path, kind)
    return _encode_plain(value)


def _encode_plain(value: object) -> Json:
    match value:
        case None | bool() | str():
            return value
        case int():
            # Beyond 64 bits other readers of JSON round, and Python limits decimal digits.
            return value if -(1 << 63) <= value < 1 << 63 else {"int": hex(value)}
        case float():
            return _encode_float(value)
        case complex():
            return {"complex": [_encode_float(value.real), _encode_float(value.imag)]}
        case bytes():
            return {"bytes": value.hex()}
    raise AssertionError(f"{type(value)} is not plain")


def _refusal(path: str, kind: type) -> TypeError:
    return TypeError(
        f"{path}: a value of type {kind.__module__}.{kind.__qualname__} can't be stored without pickle; "
        "keep it out of the state, or store what it is made of: numbers, strings, tensors, lists, dicts"
    )


def _encode_float(value: float) -> Json:
    if math.isnan(value):  # NaNs differ in sign and payload, which float.hex drops
        return {"nan": struct.pack(">d", value).hex()}
    return {"float": value.hex()}


def decode(node: Json, *, leaf: DecodeLeaf, current: object = None) -> Any:
    """The tree again.

    current: what stands in its place now; the matching part of it is shown to each `leaf` call, which may
    reuse it. Containers are always new.
    """
    if isinstance(node, list):
        return [decode(item, leaf=leaf, current=_element(current, position)) for position, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if len(node) != 1:
        raise ValueError(f"a tree node has {len(node)} tags, expected one: {sorted(node)}")
    ((tag, payload),) = node.items()
    match tag, payload:
        case "int", str():
            return int(payload, 16)
        case "float", str():
            return float.fromhex(payload)
        case "nan", str():
            return struct.unpack(">d", bytes.fromhex(payload))[0]
        case "complex", [real, imaginary]:
            return complex(decode(real, leaf=leaf), decode(imaginary, leaf=leaf))
        case "bytes", str():
            return bytes.fromhex(payload)
        case "tuple", list():
            return tuple(decode(payload, leaf=leaf, current=current))
        case (("set" | "frozenset"), list()):
            return _TAG_TYPES[tag](decode(payload, leaf=leaf))
        case (("dict" | "ordered" | "counter"), list()):
            return _TAG_TYPES[tag](_decode_items(payload, leaf=leaf, current=current))
    return leaf(tag, payload, current)


def _decode_items(items: Iterable[Json], *, leaf: DecodeLeaf, current: object) -> dict[object, object]:
    decoded: dict[object, object] = {}
    for pair in items:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"an entry of a dict is not a pair: {pair!r}")
        key = decode(pair[0], leaf=leaf)
        here = current.get(key) if isinstance(current, dict) else None
        decoded[key] = decode(pair[1], leaf=leaf, current=here)
    return decoded


def _element(current: object, position: int) -> object:
    if isinstance(current, list | tuple) and position < len(current):
        return current[position]
    return None
