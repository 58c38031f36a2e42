"""The digest of a state, put together from digests of its chunks, whoever holds them."""

from __future__ import annotations

import xxhash

CHUNK_DIGEST_BYTES = 16


def state_digest(skeleton: bytes, chunk_digests: bytes) -> str:
    """xxh3_128 over the skeleton and the xxh3_128 of every chunk (see `snapshot.core.chunks`), in hexadecimal.

    chunk_digests: of all chunks, in the order of the state, 16 bytes each as xxhash spells them (the highest first).
    """
    assert len(chunk_digests) % CHUNK_DIGEST_BYTES == 0, len(chunk_digests)
    hashed = xxhash.xxh3_128(skeleton)
    hashed.update(chunk_digests)
    return hashed.hexdigest()
