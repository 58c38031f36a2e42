"""A rank's way back to a snapshot: the shares of the state, from the keepers that hold them, or from storage.

A rank that needs only a part of the state reads only the shares that have some of it, and keeps only that part.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np

from actors.reading import fetch_front, fetch_slot
from actors.transfer import TransferCorrupt
from snapshot.arena import SlotView
from snapshot.core.ranges import Ranges, common, offset_of, size_of
from snapshot.files import open_files
from snapshot.skeleton import Skeleton
from snapshot.stored import Stored
from snapshot.table import StateTable

from .core.plan import Restore, Share

READERS = 4
"""Shares that are read at the same time, from different keepers."""

Wanted: TypeAlias = Ranges | Callable[[Skeleton], Ranges] | None
"""Which bytes of the state are needed, of whole elements: these, or those that come of its layout; None for all."""


def fetch_stored(url: str, folder: str, wanted: Wanted = None) -> StateTable:
    """The state of this checkpoint, in a folder of `url` or of another one that stands before its name.

    Raises StorageError, RottenCheckpoint or ManifestError.
    """
    place, _, folder = folder.rpartition("/")
    url = place or url
    stored = Stored.open(open_files(url, allow_memory=True), folder)
    table = _empty(stored.skeleton.to_bytes(), wanted)
    places = []
    for start, stop in table.held_ranges():
        at = start
        for piece in table.pieces(start, stop):
            places.append((at, piece.numpy().data))
            at += piece.numel()
    stored.fill(places)
    return table


def fetch(restore: Restore, secret: str, wanted: Wanted = None) -> StateTable:
    """The state of this snapshot. Raises TransferError if it can't be had, whole and verified, from there."""

    def place(share: Share) -> dict[str, Any]:
        address = (share.keeper.host, share.keeper.port)
        return {"address": address, "secret": secret, "key": restore.key, "node": share.node, "rank": share.rank}

    first, skeleton = fetch_front(**place(restore.shares[0]), skeleton=True)
    table = _empty(skeleton, wanted)
    needed = table.held_ranges()

    def fetch_share(share: Share) -> int:
        if wanted is not None and not common(fetch_front(**place(share))[0].ranges, needed):
            return 0
        slot = fetch_slot(**place(share))
        if slot.head().skeleton != first.skeleton:
            raise TransferCorrupt(f"{slot.name} is of another state than that of rank {first.rank}")
        return _fill(table, needed, slot)

    with ThreadPoolExecutor(READERS, "reading") as readers:
        filled = sum(readers.map(fetch_share, restore.shares))
    assert filled == size_of(needed), f"the shares of {restore.key} have {filled} of {size_of(needed)} bytes"
    return table


def _empty(skeleton: bytes, wanted: Wanted) -> StateTable:
    return StateTable.empty(skeleton, wanted(Skeleton.from_bytes(skeleton)) if callable(wanted) else wanted)


def _fill(table: StateTable, needed: Ranges, slot: SlotView) -> int:
    """What a slot has of these bytes, into the table. How many they are."""
    head = slot.head()
    there = common(head.ranges, needed)
    for start, stop in there:
        at = head.skeleton_bytes + offset_of(head.ranges, start)
        for piece in table.pieces(start, stop):
            piece.numpy()[:] = np.frombuffer(slot.payload, np.uint8, piece.numel(), at)
            at += piece.numel()
    return size_of(there)
