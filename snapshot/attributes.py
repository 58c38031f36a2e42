"""What a module is beside its tensors: which parameters want a gradient, and each part's plain attributes.

A plain attribute is a value of exactly one of `_TYPES` in a part's `__dict__`: `training`, a Dropout's `p`, a counter.
What nn.Module keeps there for itself is none. A class names those that are no state in `attributes_beside_state`.

Loading sets the attributes that were captured. Of others it removes what has appeared since the part was captured, or
loaded, for the first time in this process: that is how a rollback undoes an attribute that the loop has added. What a
part was built with stays, so that a checkpoint of an older class does not take from a newer one what it needs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, compress, count
from operator import attrgetter, is_, is_not
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from snapshot.tree import Json, decode, encode, to_bytes

_TYPES = frozenset({type(None), bool, int, float, str})
_COMPILER = {"_compiled_call_impl", "_is_torch_compile", "_torchdynamo_wrapper_id"}
"""What torch.compile puts there; an id is another in each process."""
_INTERNAL = (frozenset(vars(nn.Module())) - {"training"}) | _COMPILER
_OTHER = object()
"""Stands for a value that is not plain, and need not stay alive."""

_DICT: Callable[[nn.Module], dict[str, Any]] = attrgetter("__dict__")
_REQUIRES_GRAD: Callable[[Tensor], bool] = attrgetter("requires_grad")

_built_with: "WeakKeyDictionary[nn.Module, frozenset[str]]" = WeakKeyDictionary()


def plain_attributes(part: nn.Module) -> dict[str, Any]:
    """Sorted by name: when they were set does not matter."""
    found = [key for key, value in vars(part).items() if type(value) in _TYPES and _may_be_state(part, key)]
    return {key: vars(part)[key] for key in sorted(found)}


def _may_be_state(part: nn.Module, key: object) -> bool:
    beside: Iterable[str] = getattr(type(part), "attributes_beside_state", ())
    return type(key) is str and key not in _INTERNAL and key not in beside


def capture_attributes(module: nn.Module) -> list[Json]:
    """[path, attributes] of each part, once."""
    for part in module.modules():
        _remember(part)
    return [_spell(path, part) for path, part in module.named_modules()]


def _spell(path: str, part: nn.Module) -> Json:
    return [path, encode(plain_attributes(part), path=path, leaf=lambda *_: None)]


def _remember(part: nn.Module) -> None:
    _built_with.setdefault(part, frozenset(plain_attributes(part)))


def capture_frozen(module: nn.Module) -> list[Json]:
    """The parameters that want no gradient."""
    return [path for path, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad]


def restorers(parts: Mapping[str, nn.Module], stored: Iterable[Any]) -> Iterator[Callable[[], None]]:
    """What gives the parts these attributes."""
    for path, node in stored:
        part = parts[path]
        _remember(part)
        yield _restorer(part, decode(node, leaf=_no_leaf))


def _restorer(part: nn.Module, values: Mapping[str, Any]) -> Callable[[], None]:
    def restore() -> None:
        for key in plain_attributes(part).keys() - values.keys() - _built_with[part]:
            del part.__dict__[key]
        held = (part._parameters, part._buffers, part._modules)
        for key, value in values.items():
            if _may_be_state(part, key) and not any(key in each for each in held):
                part.__dict__[key] = value

    return restore


def _no_leaf(tag: str, *_: object) -> object:
    raise ValueError(f"skeleton: an attribute of a module with the tag {tag!r:.80}")


class WatchedAttributes:
    """`capture_attributes` and `capture_frozen` again, as nodes and spelled. Nodes that were given out do not change.

    What was seen is kept alive, so an identity is never another's; but not what is no plain value, perhaps large.
    """

    def __init__(self, module: nn.Module) -> None:
        self._paths, self._parts = zip(*module.named_modules(), strict=True)
        named = list(module.named_parameters(remove_duplicate=False))
        self._names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._look()
        self._look_at_gradients(list(map(_REQUIRES_GRAD, self._parameters)))

    def _look(self) -> None:
        self._dicts = list(map(_DICT, self._parts))
        self._sizes, self._all_keys = list(map(len, self._dicts)), list(chain.from_iterable(self._dicts))
        own = [(at, each, key) for at, each in enumerate(self._dicts) for key in each if key not in _INTERNAL]
        self._owners, self._holders, self._keys = (
            [at for at, _, _ in own],
            [d for _, d, _ in own],
            [k for _, _, k in own],
        )
        self._values = list(map(_held, map(dict.get, self._holders, self._keys)))
        self.node: list[Json] = list(map(_spell, self._paths, self._parts))
        self._spellings = list(map(to_bytes, self.node))
        self.spelling = b"[%b]" % b",".join(self._spellings)

    def _look_at_gradients(self, wanted: list[bool]) -> None:
        self._wanted = wanted
        self.frozen: list[Json] = [name for name, wants in zip(self._names, wanted, strict=True) if not wants]
        self.frozen_spelling = to_bytes(self.frozen)

    def update(self) -> None:
        wanted = list(map(_REQUIRES_GRAD, self._parameters))
        if wanted != self._wanted:
            self._look_at_gradients(wanted)
        if not self._has_same_keys():
            self._look()
            return
        now = list(map(dict.get, self._holders, self._keys))
        changed = set()
        for position in compress(count(), map(is_not, now, self._values)):
            former, value = self._values[position], _held(now[position])
            if former is not value:
                self._values[position] = value
                changed.add(self._owners[position])
        if changed:
            self._spell_anew(changed)

    def _has_same_keys(self) -> bool:
        dicts = self._dicts
        if not all(map(is_, map(_DICT, self._parts), dicts)) or list(map(len, dicts)) != self._sizes:
            return False
        return list(chain.from_iterable(dicts)) == self._all_keys

    def _spell_anew(self, changed: set[int]) -> None:
        self.node = self.node.copy()
        for owner in changed:
            self.node[owner] = _spell(self._paths[owner], self._parts[owner])
            self._spellings[owner] = to_bytes(self.node[owner])
        self.spelling = b"[%b]" % b",".join(self._spellings)


def _held(value: object) -> object:
    return value if type(value) in _TYPES else _OTHER
