"""The digest of a state, put together from digests of its chunks, whoever holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from snapshot.core.ranges import Ranges, first_uneven

CHUNK_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePart:
    """What one rank says of the part of a state that it answers for.

    skeleton: digest of the state's skeleton. ranges: whole chunks. digests: of each range, those of its chunks, 16
    bytes each as xxhash spells them (the highest first).
    """

    skeleton: bytes
    state_bytes: int
    ranges: Ranges
    digests: tuple[bytes, ...]


def state_digest(skeleton: bytes, chunk_digests: bytes) -> str:
    """xxh3_128 over those of the skeleton and of every chunk (see `snapshot.core.chunks`), in hexadecimal.

    chunk_digests: of all chunks, in the order of the state.
    """
    return _combined(xxhash.xxh3_128_digest(skeleton), chunk_digests)


def put_together(parts: Iterable[StatePart]) -> str:
    """The same from all ranks' parts, of which several may be of the same ranges. Raises ValueError where they are not
    those of one state."""
    known = list(parts)
    if len({(part.skeleton, part.state_bytes) for part in known}) != 1:
        raise ValueError("the ranks' parts are of states of different structure")
    pieces = sorted({pair for part in known for pair in zip(part.ranges, part.digests, strict=True)})
    uneven = first_uneven([piece for piece, _ in pieces], known[0].state_bytes)
    if uneven is not None:
        reached, begin = uneven
        if begin < reached:
            raise ValueError(f"several ranks have the bytes of the state from {begin} on, and differ about them")
        raise ValueError(f"nobody has bytes {reached}..{begin - 1} of the state")
    return _combined(known[0].skeleton, b"".join(digest for _, digest in pieces))


def _combined(skeleton_digest: bytes, chunk_digests: bytes) -> str:
    assert len(chunk_digests) % CHUNK_DIGEST_BYTES == 0, len(chunk_digests)
    return xxhash.xxh3_128_hexdigest(skeleton_digest + chunk_digests)
