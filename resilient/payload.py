"""What a step sums, as one flat buffer: gradients, buffers that forward changed, losses.

One buffer means one message per peer and one addition per data type, whatever the number of
parameters. A `Layout` says where each tensor lies; a `Payload` is such a buffer with views into it.

Presence is counted, never zero-filled: a tensor that a micro-batch did not produce is the identity
of the fold, because -0.0 + 0 would change bits. `counts[i]` is the number of micro-batches in a
payload that produced tensor i; where it is 0 the payload's bytes mean nothing.

Types of fewer than 32 bits are added in fp32, so that a sum neither overflows nor loses what the mean has room for;
the mean is rounded once, to the tensor's own type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack

from actors.device import Mark

from .core.outcome import Outcome

ALIGN_BYTES = 64
"""Tensors and slices begin at multiples of this, so that no element is ever cut."""

PIECE_ELEMENTS = 1 << 20
"""So many at a time are divided and rounded: a temporary copy in fp32 stays small."""

Rule = Literal["sum", "first"]
"""How two present values are folded: added, or the one of the lower micro-batch taken."""


def rule_of(dtype: torch.dtype) -> Rule:
    """That of a buffer. Integers are not averaged, nor are floats of 8 bits or fewer: they are codes, of which a mean
    is none."""
    return "sum" if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1) else "first"


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """In which values of this type are added."""
    if dtype is torch.complex32:
        return torch.complex64
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor in the layout."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    """In which it lies here; its own may be a lower one."""
    rule: Rule
    start: int
    """First byte."""
    nbytes: int

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A run of entries of one type and rule, folded as one."""

    dtype: torch.dtype
    own: torch.dtype
    """Of the tensors themselves."""
    rule: Rule
    start: int
    stop: int
    entries: range

    @property
    def elements(self) -> int:
        """Room between entries included."""
        return (self.stop - self.start) // self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    entries: tuple[Entry, ...]
    sections: tuple[Section, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, Tensor, Rule]]) -> Layout:
        """Lay out tensors like the given ones, in this order within each type and rule."""
        kinds = list(dict.fromkeys((tensor.dtype, rule) for _, tensor, rule in tensors))
        entries: list[Entry] = []
        sections: list[Section] = []
        at = 0
        for dtype, rule in kinds:
            first, start = len(entries), at
            kept = sum_type(dtype) if rule == "sum" else dtype
            for name, tensor, own_rule in tensors:
                if (tensor.dtype, own_rule) != (dtype, rule):
                    continue
                nbytes = tensor.numel() * kept.itemsize
                entries.append(Entry(name=name, shape=tensor.shape, dtype=kept, rule=rule, start=at, nbytes=nbytes))
                at += -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
            sections.append(
                Section(dtype=kept, own=dtype, rule=rule, start=start, stop=at, entries=range(first, len(entries)))
            )
        return cls(entries=tuple(entries), sections=tuple(sections), nbytes=at)

    def followed_by(self, other: Layout) -> Layout:
        """This layout with the other's entries and sections behind it, types not mixed."""
        shift, first = self.nbytes, len(self.entries)
        entries = (replace(entry, start=entry.start + shift) for entry in other.entries)
        sections = (
            replace(
                section,
                start=section.start + shift,
                stop=section.stop + shift,
                entries=range(section.entries.start + first, section.entries.stop + first),
            )
            for section in other.sections
        )
        return Layout(
            entries=(*self.entries, *entries),
            sections=(*self.sections, *sections),
            nbytes=self.nbytes + other.nbytes,
        )

    def index(self) -> dict[str, int]:
        return {entry.name: number for number, entry in enumerate(self.entries)}

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Section, int, int]]:
        """The sections within a byte range, each with its part of the range."""
        for section in self.sections:
            low, high = max(start, section.start), min(stop, section.stop)
            if low < high:
                yield section, low, high


class Payload:
    """A buffer of a layout, with what it holds.

    `flat` is a uint8 tensor of shape (layout.nbytes,); `views[i]` is entry i in its own type and shape.
    """

    __slots__ = ("counts", "flat", "foreign", "layout", "outcome", "released", "views")

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        self.views = [
            self.flat[entry.start : entry.stop].view(entry.dtype).view(entry.shape) for entry in layout.entries
        ]
        self.counts = [0] * len(layout.entries)
        self.released = Mark(device)
        """What may still read or write it as it goes back into its pool: threads may have streams of their own."""
        self.foreign: dict[str, Tensor] = {}
        """Of a complete result: sums of uses of shared parameters in other stages, by name."""
        self.outcome: Outcome | None = None
        """Of a complete result in a pipeline of several stages: what only some ranks have computed."""

    def repacked(self, layout: Layout) -> Payload:
        """The same content in a wider layout."""
        wider = Payload(layout, self.flat.device)
        places = layout.index()
        for entry, view, count in zip(self.layout.entries, self.views, self.counts, strict=True):
            if count:
                wider.views[places[entry.name]].copy_(view)
                wider.counts[places[entry.name]] = count
        return wider


def fold_range(
    layout: Layout,
    target: Tensor,
    left: Tensor,
    right: Tensor,
    start: int,
    masks: tuple[Sequence[int], Sequence[int]] | None,
) -> None:
    """target = left + right, for the byte range that begins at `start` in the layout.

    The three are uint8 tensors of one shape (bytes of the range,); target may be left or right.
    `masks` are the counts of left and right, or None when both hold the same tensors: then absent
    ones are folded too, into bytes that mean nothing.
    """
    for section, low, high in layout.pieces(start, start + target.numel()):
        if masks is None:
            _fold(section, target, left, right, low - start, high - start)
            continue
        for number in section.entries:
            entry = layout.entries[number]
            piece = max(low, entry.start) - start, min(high, entry.stop) - start
            if piece[0] >= piece[1]:
                continue
            if masks[0][number] and masks[1][number]:
                _fold(section, target, left, right, *piece)
            elif masks[0][number] or masks[1][number]:
                source = left if masks[0][number] else right
                if target is not source:
                    target[slice(*piece)].copy_(source[slice(*piece)])


def _fold(section: Section, target: Tensor, left: Tensor, right: Tensor, start: int, stop: int) -> None:
    if section.rule == "first":
        if target is not left:
            target[start:stop].copy_(left[start:stop])
        return
    into, one, other = (side[start:stop].view(section.dtype) for side in (target, left, right))
    torch.add(one, other, out=into)


class Means:
    """The mean of complete sums, each tensor in its own type: what becomes `.grad`.

    The memory is lent to the user's code, which may keep any part of it, and is written again only when nobody does:
    what is lent is a storage around it that lives as long as it is held.
    """

    def __init__(self, layout: Layout, sections: Sequence[Section], device: torch.device) -> None:
        self._sections: list[tuple[Section, int, list[tuple[int, torch.Size, tuple[int, ...], int]]]] = []
        """Each with its first byte here, and of its entries number, shape, strides and first element."""
        at = 0
        for section in sections:
            entries = []
            for number in section.entries:
                entry = layout.entries[number]
                first = at // section.own.itemsize + (entry.start - section.start) // section.dtype.itemsize
                strides = torch.empty(entry.shape, device="meta").stride()
                entries.append((number, entry.shape, strides, first))
            self._sections.append((section, at, entries))
            at += -(-section.elements * section.own.itemsize // ALIGN_BYTES) * ALIGN_BYTES
        self._memory = torch.empty(at, dtype=torch.uint8, device=device)
        self._lent: Any = None

    def of(self, total: Tensor, divisor: int) -> dict[int, Tensor]:
        """total: a payload's bytes. The means by number of entry."""
        lent = self._lend()
        found: dict[int, Tensor] = {}
        for section, start, entries in self._sections:
            sums = total[section.start : section.stop].view(section.dtype)
            means = lent[start : start + section.elements * section.own.itemsize].view(section.own)
            for one, into in zip(*(torch.split(each, PIECE_ELEMENTS) for each in (sums, means)), strict=True):
                torch.div(one, divisor, out=into)
            for number, shape, strides, first in entries:
                found[number] = means.as_strided(shape, strides, first)
        return found

    def _lend(self) -> Tensor:
        if self._lent is not None and not self._lent.expired():
            self._memory = torch.empty_like(self._memory)
        lent = from_dlpack(self._memory)
        self._lent = StorageWeakRef(lent.untyped_storage())  # type: ignore[no-untyped-call]
        return lent


def merged_counts(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(left, right, strict=True)]


class Pool:
    """Payloads to be used again, so that no step allocates after the first ones."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self._free: list[Payload] = []
        self._given_up: list[Tensor] = []

    def take(self) -> Payload:
        payload = self._free.pop() if self._free else Payload(self.layout, self.device)
        payload.released.precede()
        payload.counts = [0] * len(self.layout.entries)
        payload.foreign, payload.outcome = {}, None
        return payload

    def give_back(self, payload: Payload) -> None:
        if payload.layout is self.layout:
            payload.released = Mark(self.device)
            self._free.append(payload)

    def give_up(self, payload: Payload) -> None:
        """Never use it again: an abandoned exchange may still write into it. A device's memory the group keeps until
        nothing writes there any more."""
        if self.device.type == "cpu":
            release_pages(payload.flat)
            self._given_up.append(payload.flat)

    def widen(self, layout: Layout) -> None:
        self.layout = layout
        self._free.clear()


_abandoned: list[Tensor] = []


def abandon(buffers: Iterable[Tensor]) -> None:
    """What others may still write into, since a link broke while it was received: it is used for nothing any more."""
    for buffer in buffers:
        release_pages(buffer)
        _abandoned.append(buffer)


def release_pages(flat: Tensor) -> None:
    """Give a CPU buffer's memory back while its addresses stay valid.

    A late write into an abandoned buffer must never hit memory that is used for something else, so
    the addresses are kept for good; the pages behind them are not (MADV_DONTNEED).
    """
    if flat.device.type != "cpu" or flat.numel() == 0:
        return
    page = 4096
    start = -(-flat.data_ptr() // page) * page
    stop = (flat.data_ptr() + flat.nbytes) // page * page
    if stop > start:
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), 4)
