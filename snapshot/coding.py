"""Chunks as they are stored: as they are, or compressed by zstd after their items' bytes were regrouped.

The exponents of floats that lie beside each other are alike, their mantissas are noise. So first the first byte of
each item is written, then the second of each, and so on (a *byte shuffle*); zstd finds what is alike, and skips
what isn't. Which coding a chunk gets depends on its bytes and the level alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import zstandard

WORTH = 0.97
"""A chunk that zstd leaves longer than this is stored as it is: reading it is then faster."""

_WINDOW_LIMIT_BYTES = 128 << 20


class CodingError(ValueError):
    """Stored bytes are no coding of so many bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """shuffle: the item size by which bytes were regrouped; 1: they weren't. data: the bytes to store."""

    coding: Literal["raw", "zstd"]
    shuffle: int
    data: bytes | memoryview


class Encoder:
    """Of one thread."""

    def __init__(self, level: int) -> None:
        """level: zstd's; raises ValueError if it has no such."""
        if type(level) is not int or not 1 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise ValueError(f"compression: got {level!r}, must be 1..{zstandard.MAX_COMPRESSION_LEVEL}, or None")
        self._compressor = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
        self._room = bytearray()

    def encode(self, raw: memoryview, item_bytes: int) -> Encoded:
        """item_bytes: of one element of the tensor that this is a piece of."""
        item_bytes = item_bytes if len(raw) % item_bytes == 0 else 1
        packed = self._compressor.compress(self._regrouped(raw, item_bytes))
        if len(packed) > WORTH * len(raw):
            return Encoded(coding="raw", shuffle=1, data=raw)
        return Encoded(coding="zstd", shuffle=item_bytes, data=packed)

    def _regrouped(self, raw: memoryview, item_bytes: int) -> memoryview:
        if item_bytes == 1:
            return raw
        if len(self._room) < len(raw):  # kept: touching new pages takes as long as the shuffle
            self._room = bytearray(len(raw))
        room = memoryview(self._room)[: len(raw)]
        shuffle(raw, item_bytes, room)
        return room


class Decoder:
    """Of one thread."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT_BYTES)

    def decode(self, data: bytes | memoryview, item_bytes: int, into: memoryview) -> None:
        """Fill `into` from one frame of zstd, shuffled by items of so many bytes. Allocates no more than its length.

        Raises CodingError unless the frame says that it holds so many bytes, and does.
        """
        try:
            # Before anything is allocated: zstandard believes the frame.
            frame = zstandard.get_frame_parameters(data)
            if frame.content_size != len(into):
                raise CodingError(f"a frame of {frame.content_size} bytes, {len(into)} were expected")
            raw = self._decompressor.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CodingError(f"no frame of zstd: {error}") from error
        if len(raw) != len(into):
            raise CodingError(f"a frame of {len(raw)} bytes, {len(into)} were expected")
        if item_bytes > 1:
            unshuffle(raw, item_bytes, into)
        else:
            into[:] = raw


def shuffle(raw: memoryview, item_bytes: int, into: memoryview) -> None:
    """The first byte of each item, then the second of each, and so on, into as many bytes."""
    items = np.frombuffer(raw, np.uint8).reshape(-1, item_bytes)
    columns = np.frombuffer(into, np.uint8).reshape(item_bytes, -1)
    for place in range(item_bytes):  # twice as fast as copying the transposed array
        columns[place] = items[:, place]


def unshuffle(data: bytes | memoryview, item_bytes: int, into: memoryview) -> None:
    """The inverse of `shuffle`, into as many bytes."""
    columns = np.frombuffer(data, np.uint8).reshape(item_bytes, -1)
    items = np.frombuffer(into, np.uint8).reshape(-1, item_bytes)
    for place in range(item_bytes):
        items[:, place] = columns[place]
