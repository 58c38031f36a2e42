"""The bits of a run's state after a step, by path: small enough to be sent and compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import xxhash

from snapshot.absent import is_absent
from snapshot.capture import capture
from snapshot.state_tree import places, spelling, tree_of
from snapshot.table import StateTable

from .loading import shown_name

MOST_SHOWN = 4
"""Elements of a tensor that a report shows."""
WORDS = 80

Entry: TypeAlias = "tuple[bytes | None, str, int]"
"""Of a tensor or value: its digest (None where its bytes are on other ranks), how it reads, and its elements: 0 for a
plain value."""


def entries(objects: Mapping[str, object]) -> dict[str, Entry]:
    """By path, of all that was given to `protect` and of `run.state`."""
    mine = {name: thing for name, thing in objects.items() if name.startswith("user:") or name == "run.state"}
    table = capture(mine)
    tree = tree_of({shown_name(name): node for name, node in table.layout.objects.items()}, everything=True)
    return {
        place.name: _plain(place.value) if place.tensor is None else _tensor(table, place.tensor)
        for place in places(tree)
    }


def _plain(value: object) -> Entry:
    return spelling(value), _short(repr(value)), 0


def _tensor(table: StateTable, number: int) -> Entry:
    tensor, spec = table.tensors[number], table.layout.tensors[number]
    if is_absent(tensor):
        return None, "on other ranks", tensor.numel()
    hashed = xxhash.xxh3_128(f"{spec.dtype} {spec.shape} {spec.order}".encode())
    start = table.layout.offsets[number]
    for piece in table.pieces(start, start + spec.nbytes):
        hashed.update(piece.cpu().numpy().data)
    few = tensor.numel() <= MOST_SHOWN
    shown = _short(str(tensor.tolist())) if few else f"{spec.dtype} {list(spec.shape)}, xxh3 {hashed.hexdigest()[:8]}"
    return hashed.digest(), shown, max(1, tensor.numel())


def _short(text: str) -> str:
    return text if len(text) <= WORDS else f"{text[: WORDS - 3]}..."
