"""A state of which each of several ranks holds only a part: taken apart, and compared with the whole."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from snapshot.absent import hold_parts, release
from snapshot.core import chunks
from snapshot.core.ranges import Ranges, clipped, merged
from snapshot.table import StateTable
from tests.checkpoints import Parts, build, train


def trained(seed: int = 0) -> Parts:
    """A new copy at each call."""
    return copy.deepcopy(_trained(seed))


@functools.cache
def _trained(seed: int) -> Parts:
    parts = build(seed)
    train(parts)
    return parts


def spread(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """What need not be on every rank: each parameter and each tensor of its optimizer state, once, by name."""
    model, optimizer = parts["model"], parts["optimizer"]
    for name, parameter in model.named_parameters():
        yield name, parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name} {key}", value


def bytes_in(table: StateTable, ranges: Ranges) -> bytes:
    return b"".join(piece.numpy().tobytes() for start, stop in ranges for piece in table.pieces(start, stop))


def keep_only(tensor: Tensor, spans: Ranges) -> None:
    """Of its bytes, in the order in memory, only these stay; parameters are kept whole or not at all."""
    nbytes, size = tensor.nbytes, tensor.element_size()
    if tensor.numel() == 0 or spans == ((0, nbytes),):
        return
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    parts = [(start // size, flat[start // size : stop // size].clone()) for start, stop in spans]
    release(tensor)
    if parts:
        hold_parts(tensor, parts)


def places(parts: Parts, table: StateTable) -> dict[str, int]:
    """Of what can be spread: where it begins in the state."""
    starts = {}
    for name, tensor in spread(parts):
        (place,) = (n for n, held in enumerate(table.tensors) if held.is_set_to(tensor.detach()))
        starts[name] = table.layout.offsets[place]
    return starts


def take_away(parts: Parts, starts: dict[str, int], kept: Ranges) -> None:
    """All that can be spread and is not in these bytes of the state."""
    for name, tensor in spread(parts):
        at = starts[name]
        keep_only(tensor, tuple((a - at, b - at) for a, b in clipped(kept, at, at + tensor.nbytes)))


def others(ranges: Ranges, nbytes: int) -> Ranges:
    """All other bytes of the state."""
    cuts = [0, *(cut for pair in ranges for cut in pair), nbytes]
    return merged(zip(cuts[::2], cuts[1::2], strict=True))


def filled(skeleton: bytes, ranges: Ranges, data: bytes) -> StateTable:
    """A table that holds these bytes of the state. data: all of them."""
    table = StateTable.empty(skeleton, ranges)
    for start, stop in ranges:
        at = start
        for piece in table.pieces(start, stop):
            piece.copy_(torch.frombuffer(bytearray(data[at : at + piece.numel()]), dtype=torch.uint8))
            at += piece.numel()
    return table


@contextmanager
def small_chunks(elements: int = 16) -> Iterator[None]:
    """States of a few bytes have many chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_ELEMENTS", elements)
        yield


def whole_chunks(ends: Sequence[int], owners: Sequence[int], rank: int) -> Ranges:
    """The chunks that are this rank's. owners: of each chunk."""
    spans = zip((0, *ends), ends, strict=False)
    return merged(span for span, owner in zip(spans, owners, strict=True) if owner == rank)
