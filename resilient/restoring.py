"""A rank's way back to a snapshot: all shares of the state, from the keepers that hold them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from actors.vault import fetch_slot
from snapshot.core.ranges import Ranges
from snapshot.files import open_files
from snapshot.stored import Stored
from snapshot.table import StateTable

from .core.plan import Restore, Share

READERS = 4
"""Shares that are read at the same time, from different keepers."""


def fetch_stored(url: str, folder: str) -> StateTable:
    """The state of this checkpoint. Raises StorageError, RottenCheckpoint or ManifestError."""
    stored = Stored.open(open_files(url, allow_memory=True), folder)
    table = StateTable.empty(stored.skeleton.to_bytes())
    ranges, at = [], 0
    for piece in table.pieces(0, table.nbytes):
        ranges.append((at, piece.numpy().data))
        at += piece.numel()
    stored.fill(ranges)
    return table


def fetch(restore: Restore, secret: str) -> StateTable:
    """The state of this snapshot. Raises TransferError if it can't be had, whole and verified, from there."""

    def fetch_share(share: Share) -> tuple[Ranges, bytes, memoryview]:
        address = (share.keeper.host, share.keeper.port)
        slot = fetch_slot(address, secret, key=restore.key, node=share.node, rank=share.rank)
        head = slot.head()
        return head.ranges, bytes(slot.payload[: head.skeleton_bytes]), slot.payload[head.skeleton_bytes :]

    with ThreadPoolExecutor(READERS, "reading") as readers:
        shares = list(readers.map(fetch_share, restore.shares))
    table = StateTable.empty(shares[0][1])
    for ranges, _, data in shares:
        source, at = torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) else torch.empty(0), 0
        for piece in (each for start, stop in ranges for each in table.pieces(start, stop)):
            piece.copy_(source[at : at + piece.numel()])
            at += piece.numel()
    return table
