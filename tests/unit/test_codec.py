"""Parity: every loss up to m blocks is made good, by ISA-L as by its twin, and refusals are clear."""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from snapshot import codec, isal
from snapshot.codec import BACKENDS, Codec, multiply_add
from snapshot.galois import INVERSES, PRODUCTS, Bytes, NumpyKernel, inverse, matrix_product

SIZES = [(k, m) for k in range(1, 9) for m in range(5)]


def blocks(count: int, length: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (count, length), np.uint8)


def stripe(code: Codec, length: int) -> Bytes:
    """All k + m blocks."""
    made = blocks(code.k + code.m, length)
    code.encode(list(made[: code.k]), list(made[code.k :]))
    return made


# The field


def multiplied(left: int, right: int) -> int:
    """By hand: shift and add."""
    total = 0
    for bit in range(8):
        if right >> bit & 1:
            total ^= left << bit
    for bit in range(15, 7, -1):
        if total >> bit & 1:
            total ^= 0x11D << (bit - 8)
    return total


def test_products_and_inverses() -> None:
    for left, right in itertools.product(range(256), repeat=2):
        assert PRODUCTS[left, right] == multiplied(left, right)
    assert all(PRODUCTS[number, INVERSES[number]] == 1 for number in range(1, 256))


def test_inverse_of_a_matrix_that_needs_its_rows_exchanged() -> None:
    matrix = np.array([[0, 3, 1], [5, 0, 0], [0, 0, 7]], np.uint8)
    assert np.array_equal(matrix_product(matrix, inverse(matrix)), np.eye(3, dtype=np.uint8))


# The code


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "m"), SIZES)
def test_every_loss_is_made_good(k: int, m: int, backend: str) -> None:
    code = Codec(k, m, backend)
    whole = stripe(code, 67)
    assert np.array_equal(whole, stripe(Codec(k, m, "numpy"), 67))
    for lost in itertools.combinations(range(k + m), m):
        available = {index: whole[index] for index in range(k + m) if index not in lost}
        out = np.full((m, 67), 0xEE, np.uint8)
        code.reconstruct(available, lost, list(out))
        assert np.array_equal(out, whole[list(lost)]), lost


@pytest.mark.parametrize(("k", "m"), [(251, 4), (4, 251), (128, 127), (255, 0), (1, 254)])
def test_the_largest_codes(k: int, m: int) -> None:
    code = Codec(k, m)
    whole = stripe(code, 5)
    lost = np.random.default_rng(1).permutation(k + m)[:m].tolist()
    out = np.zeros((m, 5), np.uint8)
    code.reconstruct({index: whole[index] for index in range(k + m) if index not in lost}, lost, list(out))
    assert np.array_equal(out, whole[lost])


def test_one_parity_block_is_the_xor_and_one_data_block_is_mirrored() -> None:
    whole = stripe(Codec(5, 3), 100)
    assert np.array_equal(whole[5], np.bitwise_xor.reduce(whole[:5]))
    mirrored = stripe(Codec(1, 3), 100)
    assert all(np.array_equal(block, mirrored[0]) for block in mirrored)


def test_the_code_never_changes() -> None:
    """What one release has written, another must read."""
    assert Codec(4, 2).coefficients.tolist() == [[1, 1, 1, 1], [1, 217, 92, 172]]
    with pytest.raises(ValueError, match="read-only"):
        Codec(4, 2).coefficients[0, 0] = 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_length_and_nothing_beyond_it(backend: str) -> None:
    code = Codec(3, 2, backend)
    for length in range(201):
        whole = stripe(Codec(3, 2, "numpy"), length)
        room = np.full((4, length + 80), 0xEE, np.uint8)
        targets = [row[33 : 33 + length] for row in room]
        code.encode(list(whole[:3]), targets[:2])
        for row, target in enumerate(targets[2:]):
            target[:] = 0
            for column in range(3):
                code.update(row, column, whole[column], target)
        for target, expected in zip(targets, [whole[3], whole[4], whole[3], whole[4]], strict=True):
            assert np.array_equal(target, expected), length
        assert (room[:, :33] == 0xEE).all()
        assert (room[:, 33 + length :] == 0xEE).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_coefficient(backend: str) -> None:
    source = np.arange(256, dtype=np.uint8)
    for coefficient in range(256):
        target = source[::-1].copy()
        multiply_add(coefficient, source, target, backend)
        assert np.array_equal(target, source[::-1] ^ PRODUCTS[coefficient])


def test_coefficients_name_only_what_is_used() -> None:
    code = Codec(4, 2)
    assert code.recovery_coefficients([5, 4, 3, 1, 0], [2, 0]) == {2: {0: 1, 1: 1, 3: 1, 4: 1}, 0: {0: 1}}
    assert code.recovery_coefficients(range(4), [4]) == {4: {0: 1, 1: 1, 2: 1, 3: 1}}


def test_any_contiguous_buffer_will_do() -> None:
    source = np.linspace(0, 1, 64).reshape(8, 8)
    target = bytearray(520)
    Codec(1, 1).update(0, 0, source, memoryview(target)[5:517])
    assert bytes(target[5:517]) == source.tobytes()


# ISA-L


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(next(isal._candidates()))


@pytest.mark.parametrize("most_bytes", [1, 7, 64, 1000])
def test_blocks_longer_than_one_call_takes(library: ctypes.CDLL, most_bytes: int) -> None:
    kernel = isal.IsalKernel(library, most_bytes=most_bytes)
    assert isal.agrees_with_numpy(kernel)


@pytest.fixture
def no_thread_is_interrupted() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("no_thread_is_interrupted")
def test_other_threads_run_while_isal_computes(library: ctypes.CDLL) -> None:
    kernel = isal.IsalKernel(library)
    data = list(np.zeros((6, 1 << 23), np.uint8))
    matrix = np.ones((2, 4), np.uint8)
    go, ran = threading.Lock(), threading.Event()

    def wait_and_run() -> None:
        with go:
            ran.set()

    for _ in range(100):  # whether the other thread gets a processor in time is up to the machine
        ran.clear()
        go.acquire()
        other = threading.Thread(target=wait_and_run)
        other.start()
        go.release()
        before = ran.is_set()
        kernel.multiply(matrix, data[:4], data[4:])
        meanwhile = ran.is_set() and not before
        other.join()
        if meanwhile:
            return
    pytest.fail("the interpreter's lock was never free")


class Wrong(NumpyKernel):
    def multiply_add(self, coefficient: int, source: Bytes, target: Bytes) -> None:
        super().multiply_add(coefficient, source[:64], target[:64])


def test_a_library_that_computes_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isal.agrees_with_numpy(Wrong())
    monkeypatch.setattr(isal, "agrees_with_numpy", lambda kernel: False)
    with pytest.raises(OSError, match="computes wrongly on this processor"):
        isal.load()


def test_falling_back_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(isal, "_candidates", lambda: iter([str(tmp_path / "libisal.so.2")]))
    codec._isal.cache_clear()
    codec._fastest.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"libisal.so.2: cannot open.*pip install pyeclib"):
            assert codec.backend() == "numpy"
        stripe(Codec(2, 1), 10)  # warns once
        with pytest.raises(OSError, match="cannot open"):
            Codec(2, 1, "isal")
    finally:
        codec._fastest.cache_clear()
    monkeypatch.undo()
    assert codec.backend() == "isal"


# Refusals


@pytest.mark.parametrize(
    ("k", "m", "message"),
    [
        (0, 1, "k: got 0, must be at least 1"),
        (1, -1, "m: got -1, must be at least 0"),
        (200, 56, r"k \+ m: got 200 \+ 56 = 256, must be at most 255"),
    ],
)
def test_impossible_codes(k: int, m: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codec(k, m)


def test_impossible_calls_change_nothing() -> None:
    code, target = Codec(2, 1), bytearray(8)
    block = bytes(range(8))
    for call, message in (
        (lambda: Codec(2, 1, "cuda"), r"backend: got 'cuda', must be one of \('isal', 'numpy'\)"),
        (lambda: code.encode([block], [target]), "data: got 1 blocks, must be 2"),
        (lambda: code.encode([block, block], []), "parity: got 0 blocks, must be 1"),
        (lambda: code.encode([block, block[1:]], [target]), "data: 7 and 8 bytes, parity: 8 bytes; must all be of one"),
        (lambda: code.encode([block, block], [block]), r"parity\[0\]: got a read-only bytes, must be writable"),
        (lambda: code.update(1, 0, block, target), r"row: got 1, must be within 0..0 \(m = 1\)"),
        (lambda: code.update(0, -1, block, target), r"column: got -1, must be within 0..1 \(k = 2\)"),
        (lambda: code.update(0, 0, block, target[1:]), "source: 8 bytes, parity: 7 bytes; must all be of one length"),
        (lambda: code.update(0, 0, memoryview(block * 2)[::2], target), "source: .*must be a contiguous buffer"),
        (lambda: code.reconstruct({0: block}, [1], [target]), r"available: got 1 blocks \[0\], must be at least k = 2"),
        (lambda: code.reconstruct({0: block, 3: block}, [1], [target]), "available: got block 3, must be within 0..2"),
        (lambda: code.reconstruct({0: block, 1: block}, [-1], [target]), "wanted: got block -1, must be within 0..2"),
        (lambda: code.reconstruct({0: block, 1: block}, [2], []), "out: got 0 blocks, must be 1"),
        (lambda: multiply_add(256, block, target), "coefficient: got 256, must be within 0..255"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert target == bytes(8)
