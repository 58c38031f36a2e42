"""Parity in whatever order, lengths and places its bytes come: the same as computed at once."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.codec import BACKENDS, Codec, multiply_add
from snapshot.galois import Bytes

backends = st.sampled_from(BACKENDS)
sizes = st.tuples(st.integers(1, 12), st.integers(1, 5))


def random_bytes(seed: int, *shape: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def whole(code: Codec, length: int, seed: int) -> list[Bytes]:
    """All k + m blocks, by the twin."""
    made = list(random_bytes(seed, code.k + code.m, length))
    Codec(code.k, code.m, "numpy").encode(made[: code.k], made[code.k :])
    return made


@st.composite
def ranges(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Ranges that cover 0..length once, in any order."""
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=4))})
    return draw(st.permutations(list(itertools.pairwise(cuts))))


@settings(max_examples=150, deadline=None)
@given(
    backend=backends,
    size=sizes,
    length=st.integers(0, 1500),
    offsets=st.lists(st.integers(0, 70)),
    seed=st.integers(0, 99),
)
def test_unaligned_blocks(backend: str, size: tuple[int, int], length: int, offsets: list[int], seed: int) -> None:
    code = Codec(*size, backend)
    expected = whole(code, length, seed)
    places = [*offsets, *range(sum(size))][: sum(size)]
    room = [np.zeros(length + 200, np.uint8)[place : place + length] for place in places]
    for target, block in zip(room, expected[: code.k], strict=False):
        target[:] = block
    code.encode(room[: code.k], room[code.k :])
    assert all(np.array_equal(*pair) for pair in zip(room, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), backend=backends, size=sizes, length=st.integers(1, 1500), seed=st.integers(0, 99))
def test_parity_grows_in_any_order(
    data: st.DataObject, backend: str, size: tuple[int, int], length: int, seed: int
) -> None:
    code = Codec(*size, backend)
    expected = whole(code, length, seed)
    row = data.draw(st.integers(0, code.m - 1))
    parts = [(column, *part) for column in range(code.k) for part in data.draw(ranges(length))]
    parity = bytearray(length)
    for column, start, stop in data.draw(st.permutations(parts)):
        code.update(row, column, expected[column][start:stop], memoryview(parity)[start:stop])
    assert bytes(parity) == expected[code.k + row].tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), backend=backends, size=sizes, length=st.integers(1, 1500), seed=st.integers(0, 99))
def test_lost_blocks_are_decoded_in_any_order(
    data: st.DataObject, backend: str, size: tuple[int, int], length: int, seed: int
) -> None:
    code = Codec(*size, backend)
    expected = whole(code, length, seed)
    order = data.draw(st.permutations(range(sum(size))))
    available, lost = order[: code.k], order[code.k :]
    coefficients = code.recovery_coefficients(available, lost)
    parts = [
        (block, index, *part) for block in lost for index in coefficients[block] for part in data.draw(ranges(length))
    ]
    out = {block: np.zeros(length, np.uint8) for block in lost}
    for block, index, start, stop in data.draw(st.permutations(parts)):
        multiply_add(coefficients[block][index], expected[index][start:stop], out[block][start:stop], backend)
    at_once = [np.zeros(length, np.uint8) for _ in lost]
    code.reconstruct({index: expected[index] for index in available}, lost, at_once)
    for block, again in zip(lost, at_once, strict=True):
        assert np.array_equal(out[block], expected[block])
        assert np.array_equal(again, expected[block])
