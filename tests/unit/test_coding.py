"""Chunks, encoded and decoded."""

import random

import numpy as np
import pytest
import zstandard

from snapshot.coding import CodingError, Decoder, Encoder, shuffle, unshuffle

WEIGHTS = memoryview(np.random.default_rng(0).standard_normal(10_000, np.float32).tobytes())
NOISE = memoryview(random.Random(0).randbytes(40_000))


def test_the_shuffle_is_what_the_format_says() -> None:
    into = memoryview(bytearray(6))
    shuffle(memoryview(b"aAbBcC"), 2, into)
    assert into == b"abcABC"


@pytest.mark.parametrize("item_bytes", [1, 2, 3, 4, 8, 16, 64])
def test_unshuffle_is_its_inverse(item_bytes: int) -> None:
    raw = NOISE[: 5 * item_bytes]
    there, back = memoryview(bytearray(len(raw))), memoryview(bytearray(len(raw)))
    shuffle(raw, item_bytes, there)
    unshuffle(there, item_bytes, back)
    assert back == raw


@pytest.mark.parametrize("item_bytes", [1, 4, 7])
@pytest.mark.parametrize("level", [1, 5])
def test_what_was_encoded_is_decoded(item_bytes: int, level: int) -> None:
    encoder = Encoder(level)
    for raw in (WEIGHTS, WEIGHTS[:400], memoryview(bytes(1000))):
        encoded = encoder.encode(raw, item_bytes)
        if encoded.coding == "raw":
            assert encoded.data == raw
            continue
        into = memoryview(bytearray(len(raw)))
        Decoder().decode(encoded.data, encoded.shuffle, into)
        assert into == raw


def test_the_shuffle_helps_and_the_coding_depends_on_the_bytes_alone() -> None:
    first, second = Encoder(1), Encoder(1)
    second.encode(NOISE, 4)
    encoded = first.encode(WEIGHTS, 4)
    assert (encoded.coding, encoded.shuffle) == ("zstd", 4)
    assert len(encoded.data) < 0.95 * len(WEIGHTS)
    assert encoded == second.encode(WEIGHTS, 4)


def test_noise_is_stored_as_it_is() -> None:
    encoded = Encoder(1).encode(NOISE, 4)
    assert (encoded.coding, encoded.shuffle) == ("raw", 1) and encoded.data is NOISE


@pytest.mark.parametrize("level", [0, 23, -1, True, 1.0])
def test_levels_that_are_refused(level: int) -> None:
    with pytest.raises(ValueError, match="compression: got"):
        Encoder(level)


FRAME = zstandard.ZstdCompressor().compress(bytes(1000))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no frame at all",
        FRAME[:-1],
        FRAME + b"x",
        FRAME + FRAME,
        zstandard.ZstdCompressor().compress(bytes(1001)),
        zstandard.ZstdCompressor().compress(bytes(10_000_000)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000)),
    ],
    ids=["empty", "garbage", "cut", "longer", "two frames", "one more byte", "a bomb", "of unknown size"],
)
def test_frames_that_are_refused(data: bytes) -> None:
    with pytest.raises(CodingError):
        Decoder().decode(data, 1, memoryview(bytearray(1000)))
