"""Capturing the same objects at every step, when little but bytes and a few plain values has changed.

What a full capture found is kept: numbers, layouts and spellings of the steady tensors. The next time the
objects are only asked whether they still hold the very same tensors, and these the same memory.

    all the same                              the kept spelling
    another buffer, laid out alike            takes the former one's place
    other plain values beside tensors,        these alone are spelled anew
    attributes or flags of modules
    extra state, dicts, what has state_dict   always encoded anew
    anything else                             a full capture

What comes out is what `capture` gives, to the byte.
"""

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from snapshot.absent import is_absent
from snapshot.capture import Capturing, capture_steady, capture_upon, capture_values, kind_of
from snapshot.front import Front
from snapshot.memory import address_of, dense_of, place_of
from snapshot.sharded import is_sharded, local_of, place_of_any
from snapshot.skeleton import Skeleton, spelled, spelled_specs
from snapshot.table import StateTable
from snapshot.tree import Json, to_bytes
from snapshot.watch import Changed, Memory, WatchedModule, WatchedOptimizer


class Recapture:
    """`capture` for use at every step. It keeps what it saw alive until the next capture.

    full: how often everything had to be captured anew.
    """

    def __init__(self) -> None:
        self.full = 0
        self._known: _Known | None = None

    def capture(self, objects: Mapping[str, object], *, in_place: bool = False) -> StateTable:
        """As `snapshot.capture.capture`; whatever has changed is noticed.

        in_place: the caller is not interested in whether tensors lie where they did.
        """
        known, self._known = self._known, None  # whatever is raised: what is half changed is not kept
        if known is not None and (table := known.again(objects, in_place)) is not None:
            self._known = known
            return table
        del known  # what is gone need not stay in memory beside what came
        self.full += 1
        steady = capture_steady(objects)
        table = capture_upon(steady, objects)
        try:
            self._known = _Known(steady, objects, table)
        except Changed:
            return table
        return self._known.shown(table.layout, table.tensors[len(steady.tensors) :], table.calm, table.skeleton)


class _Known:
    """What a full capture found."""

    def __init__(self, steady: Capturing, objects: Mapping[str, object], table: StateTable) -> None:
        self._steady = steady
        self._watches: dict[str, WatchedModule | WatchedOptimizer] = {}
        for name in sorted(objects):
            thing, structure = objects[name], table.layout.objects[name]
            if isinstance(thing, nn.Module):
                self._watches[name] = WatchedModule(name, thing, structure)
            elif isinstance(thing, Optimizer):
                self._watches[name] = WatchedOptimizer(name, thing, structure)
        tensors = [tensor for watch in self._watches.values() for tensor in watch.tensors()]
        self._memory = Memory(tensors)
        self._place = {id(tensor): place_of_any(tensor) for tensor in tensors}
        self._uses = Counter(map(place_of_any, tensors))
        self._layouts = {place[2:] for place in steady.index}
        # What has gaps in memory, so that the table has a copy.
        pairs = zip(map(local_of, steady.originals), steady.tensors, strict=True)
        self._copied = [number for number, (own, held) in enumerate(pairs) if address_of(own) != address_of(held)]
        self._calm = steady.all_calm()
        self._specs, self._spelled_specs = tuple(steady.specs), spelled_specs(steady.specs)
        self._front = Front(steady.specs, steady.tensors, self._calm)

    def again(self, objects: Mapping[str, object], in_place: bool) -> StateTable | None:
        """None if only a full capture can tell."""
        capturing = Capturing(self._steady)
        try:
            replaced = self._check(objects, in_place)
            parts = {name: self._part(capturing, name, objects[name]) for name in sorted(objects)}
            if replaced or any(place[2:] in self._layouts for place in capturing.index):
                self._memory.check_addresses()  # they decide what shares memory with a steady tensor
        except Changed:
            return None
        for number in self._copied:
            self._steady.tensors[number] = dense_of(local_of(self._steady.originals[number]))[0]
        layout = Skeleton(
            tensors=(*self._specs, *capturing.specs), objects={name: node for name, (node, _) in parts.items()}
        )
        tensors = b",".join(filter(None, (self._spelled_specs, spelled_specs(capturing.specs))))
        skeleton = spelled(objects={name: spelling for name, (_, spelling) in parts.items()}, tensors=tensors)
        calm = self._calm if capturing.calm <= self._calm else self._calm | capturing.calm
        return self.shown(layout, tuple(capturing.tensors), calm, skeleton)

    def shown(self, layout: Skeleton, rest: tuple[Tensor, ...], calm: frozenset[int], skeleton: bytes) -> StateTable:
        return StateTable.of(self._front, layout, rest, calm, skeleton)

    def _check(self, objects: Mapping[str, object], in_place: bool) -> bool:
        """Whether buffers were replaced, but nothing else. Raises Changed otherwise."""
        watched = {name: thing for name, thing in objects.items() if isinstance(thing, nn.Module | Optimizer)}
        if watched.keys() != self._watches.keys():
            raise Changed
        replaced = False
        for name, watch in self._watches.items():
            if watch.thing is not watched[name]:
                raise Changed
            for former, buffer in watch.replaced():
                self._replace(former, buffer)
                replaced = True
        if not in_place:
            self._memory.check()
        return replaced

    def _replace(self, former: Tensor, buffer: Tensor) -> None:
        """One that nothing else here refers to, by another such, laid out alike."""
        if (
            type(buffer) is not type(former)
            or is_sharded(buffer)
            or is_absent(buffer)
            or is_absent(former)
            or buffer.layout is not former.layout
            or buffer.numel() == 0
        ):
            raise Changed
        old, new = self._place.pop(id(former), ()), place_of(buffer)
        alike = (old[:1], old[2:]) == (new[:1], new[2:])
        if not alike or self._uses[old] != 1 or new in self._uses:
            raise Changed
        number = self._steady.index.pop(old)
        self._steady.index[new] = number
        self._steady.originals[number], self._steady.tensors[number] = buffer, dense_of(buffer)[0]
        del self._uses[old]
        self._uses[new], self._place[id(buffer)] = 1, new
        self._memory.replace(former, buffer)

    def _part(self, capturing: Capturing, name: str, thing: object) -> tuple[Json, bytes]:
        watch = self._watches.get(name)
        if watch is not None:
            return watch.part(capturing)
        node: Json = {kind_of(name, thing): capture_values(capturing, name, thing)}
        return node, to_bytes(node)
