"""Notices changes to the protected state at moments at which it must not change.

The user's code is equal on all ranks per step, not per micro-batch: which micro-batches a rank computes, and how many,
depends on who is alive. So between a step's boundary and its commit
    tensors        do not change: not parameters, optimizer state, averages of weights, nor tensors in `run.state`.
                   Only gradients do, and the buffers that forward writes.
    plain values   may be set, but are the same whenever a micro-batch ends: flags and numbers of modules, learning
                   rates, counters in `run.state`, whatever `state_dict()` returns.
Anything else is a LoopError that names object and path. In each step's exchange ranks compare a digest of the plain
values, since code behind the commit may still have set other ones on one rank than on another.

Torch counts writes to a tensor, but neither those through `.data` nor those that kernels make behind its back. On a CPU
the first bytes of each tensor are compared too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from operator import attrgetter

import xxhash
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel

from snapshot.front import bytes_of
from snapshot.recapture import Recapture
from snapshot.state_differences import differences
from snapshot.state_tree import flags, places, tree_of
from snapshot.table import StateTable

from .core.lane import DIGEST_BITS
from .errors import LoopError
from .loading import shown_name

SAMPLED_BYTES = 64
"""Of each tensor on a CPU, from its beginning."""
SMALL_BYTES = 4096
"""Tensors outside of modules and optimizers are compared byte by byte up to this size."""

_VERSION = attrgetter("_version")


class StateWatch:
    """One rank's. Asked by the training thread, at a step's boundary and at the end of each micro-batch."""

    def __init__(self, objects: Mapping[str, object]) -> None:
        """objects: all that is protected, and `run.state`, by their names in a capture."""
        # A scaler asks its device for its numbers, and changes only where it is gated.
        self._objects = {name: thing for name, thing in objects.items() if not isinstance(thing, GradScaler)}
        self._averages = tuple(f"{name}." for name, thing in objects.items() if isinstance(thing, AveragedModel))
        self._recapture = Recapture()
        self._firm: _Firm | None = None
        self._before: dict[tuple[str, str], object] = {}
        """Of tensors: what was seen at the step's boundary."""
        self._boundary: StateTable | None = None
        """As the step began."""
        self._table: StateTable | None = None
        """As the step's first micro-batch of this rank ended."""
        self._latest: StateTable | None = None

    @property
    def full(self) -> int:
        """How often the structure of the state had to be looked at anew."""
        return self._recapture.full

    def begin_step(self) -> None:
        """The state at a step's start stands."""
        self._boundary = table = self._recapture.capture(self._objects)
        self._table, self._before = None, self._seen(table)

    def in_force(self, step: int) -> None:
        """A micro-batch is done. Raises LoopError if plain values are others than when the last one was."""
        self._latest = table = self._recapture.capture(self._objects, in_place=True)
        if self._table is None:
            self._table = table
        elif table.skeleton != self._table.skeleton:
            raise LoopError(_changed_between(self._table, table, step))

    def commit(self, step: int) -> None:
        """All micro-batches are done. Raises LoopError if a tensor has changed that must not."""
        assert self._latest is not None, "no micro-batch has ended"
        self._check_tensors(self._latest, step)

    def digest(self) -> int:
        """Of the plain values in force, and of those at the step's start, in [0, 2**62); equal on all ranks."""
        assert self._table is not None and self._boundary is not None, "no micro-batch has ended"
        running = xxhash.xxh3_64(self._boundary.skeleton)
        running.update(self._table.skeleton)
        for value in self._small().values():
            running.update(value)
        return int(running.intdigest() >> 64 - DIGEST_BITS)

    def plain_values(self) -> dict[str, object]:
        """What the digest is of, by path."""
        assert self._table is not None and self._boundary is not None, "no micro-batch has ended"
        now, before = _named(self._table), _named(self._boundary)
        former = {f"{name} at the step's start": value for name, value in before.items() if now.get(name) != value}
        small = {f"the bytes of {shown_name(name)}": value.hex() for name, value in self._small().items()}
        return {**now, **former, **small}

    def _small(self) -> dict[str, bytes]:
        """Small tensors outside of modules and optimizers, and the beginnings of averages, which only the user's code
        writes: where they differ no machine is to blame."""
        return {
            name: value
            for (name, kind), value in self._before.items()
            if isinstance(value, bytes) and (kind == "value" or name.startswith(self._averages))
        }

    # Tensors

    def _check_tensors(self, table: StateTable, step: int) -> None:
        now = self._seen(table)
        if now == self._before:
            return
        changed = [
            name for (name, kind), value in now.items() if _is_other(kind, self._before.get((name, kind)), value)
        ]
        if changed:
            raise LoopError(
                f"{_path(table, changed[0])} changed within step {step}, before its micro-batches were done: the body "
                "of the loop over micro-batches runs as often as this rank has micro-batches, which differs from rank "
                "to rank. Write what changes the state once per step behind that loop (for step in run.steps(...): "
                "for x, y in step: ...), or under `if run.committing:` after backward"
            )
        self._before = now

    def _seen(self, table: StateTable) -> dict[tuple[str, str], object]:
        if self._firm is None or self._firm.of is not (table.front or table):
            self._firm = _Firm(table, self._averages)
        return {**self._firm.now(), **dict(_others(table))}


def digest_of(values: Mapping[str, object]) -> int:
    """Of values that JSON can say, in [0, 2**62)."""
    text = json.dumps(values, sort_keys=True)
    return int(xxhash.xxh3_64_intdigest(text.encode()) >> 64 - DIGEST_BITS)


def _others(table: StateTable) -> Iterator[tuple[tuple[str, str], object]]:
    """Tensors in dicts, and in what `state_dict()` returns, perhaps made anew by each call."""
    start = len(table.front.tensors) if table.front is not None else len(table.tensors)
    for place in range(start, len(table.tensors)):
        tensor, name = table.tensors[place], table.layout.tensors[place].name
        if tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() <= SMALL_BYTES:
            yield (name, "value"), bytes_of(tensor).numpy().tobytes()
        else:
            yield (name, "writes"), (tensor.data_ptr(), tensor._version)


class _Firm:
    """Tensors of modules and optimizers that forward does not write, as long as these are the very same."""

    def __init__(self, table: StateTable, averages: tuple[str, ...]) -> None:
        self.of = table.front or table
        specs, count = table.layout.tensors, len(table.front.tensors if table.front else table.tensors)
        places = [at for at in range(count) if at in table.calm or specs[at].name.startswith(averages)]
        self._tensors = [table.tensors[at] for at in places]
        self._keys = [(specs[at].name, "writes") for at in places]
        host = [at for at in places if table.tensors[at].device.type == "cpu" and specs[at].nbytes]
        self._keys += [(specs[at].name, "bytes") for at in host]
        self._beginnings = [memoryview(bytes_of(table.tensors[at])[:SAMPLED_BYTES].numpy().data) for at in host]

    def now(self) -> dict[tuple[str, str], object]:
        values = (*map(_VERSION, self._tensors), *map(bytes, self._beginnings))
        return dict(zip(self._keys, values, strict=True))


def _is_other(kind: str, former: object, now: object) -> bool:
    """A large tensor that is another object each time tells nothing. One bit that has changed in memory without a write
    is not the user's doing: comparing digests finds it."""
    if isinstance(former, tuple) and isinstance(now, tuple):
        return bool(former[0] == now[0] and former[1] != now[1])
    if kind == "bytes" and isinstance(former, bytes) and isinstance(now, bytes) and len(former) == len(now):
        return (int.from_bytes(former, "little") ^ int.from_bytes(now, "little")).bit_count() > 1
    return former is not None and former != now


def _path(table: StateTable, name: str) -> str:
    """Of a tensor by the name that the layout has for it."""
    place = next(place for place, spec in enumerate(table.layout.tensors) if spec.name == name)
    found = (each.name for each in places(tree_of(table.layout.objects, everything=True)) if each.tensor == place)
    return shown_name(next(found, name))


def _named(table: StateTable) -> dict[str, object]:
    objects = table.layout.objects
    values = (each for each in places(tree_of(objects)) if each.tensor is None)
    return {shown_name(each.name): repr(each.value) for each in (*values, *flags(objects))}


def _changed_between(former: StateTable, now: StateTable, step: int) -> str:
    one, other = former.layout, now.layout
    found = list(differences(one.objects, other.objects, one.tensors, other.tensors))
    name, before, after = "the structure of the state", "one", "another"
    if found:
        name, before, after = shown_name(found[0].name), repr(found[0].one), repr(found[0].other)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"{name} was {before} as one micro-batch of step {step} ended, and {after} as the next did{more}: it changes "
        "with every micro-batch, and ranks have different numbers of them. Write what changes once per step behind "
        "the loop over micro-batches (for step in run.steps(...): for x, y in step: ...), or under "
        "`if run.committing:` after backward; count by run.step; what forward itself changes belongs into a "
        "registered buffer"
    )
