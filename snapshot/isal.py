"""Intel's ISA-L, called on raw memory without the interpreter's lock.

Only `ec_init_tables` and the two `ec_encode_data` functions are called: they take any length and agree with
each other on the tables' format, which depends on the processor. `gf_vect_mad` does not: it reads tables of
the older format on processors (GFNI) for which `ec_init_tables` makes the newer one.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from snapshot.galois import Bytes, NumpyKernel

TABLE_BYTES = 32
# Around the widths of registers and of the loops over them.
CHECKED_LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 127, 128, 129, 191, 257, 512, 800)


class IsalKernel:
    """The two operations of `NumpyKernel`, at the speed of memory. Safe to share between threads."""

    name = "isal"

    def __init__(self, library: ctypes.CDLL, *, most_bytes: int = 1 << 30) -> None:
        """most_bytes: the longest block of one call, as lengths are C ints."""
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        self._fill_tables = library.ec_init_tables
        self._fill_tables.argtypes = (integer, integer, pointer, pointer)
        self._multiply = library.ec_encode_data
        self._multiply.argtypes = (integer, integer, integer, pointer, pointer, pointer)
        self._multiply_add = library.ec_encode_data_update
        self._multiply_add.argtypes = (integer, integer, integer, integer, pointer, pointer, pointer)
        for function in (self._fill_tables, self._multiply, self._multiply_add):
            function.restype = None
        self._most_bytes = most_bytes
        self._tables = lru_cache(maxsize=256)(self._make_tables)
        self._one_by_one = [self._make_tables((1, 1), bytes([number])) for number in range(256)]

    def multiply(self, matrix: Bytes, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        if not len(targets):
            return
        tables = self._tables(matrix.shape, matrix.tobytes())
        for start, size in self._parts(len(targets[0])):
            read, written = _pointers(sources, start), _pointers(targets, start)
            self._multiply(size, len(sources), len(targets), tables, read, written)

    def multiply_add(self, coefficient: int, source: Bytes, target: Bytes) -> None:
        tables = self._one_by_one[coefficient]
        for start, size in self._parts(len(target)):
            self._multiply_add(size, 1, 1, 0, tables, _address(source) + start, _pointers((target,), start))

    def _make_tables(self, shape: tuple[int, int], matrix: bytes) -> ctypes.Array[ctypes.c_char]:
        rows, columns = shape
        tables = ctypes.create_string_buffer(TABLE_BYTES * rows * columns)
        self._fill_tables(columns, rows, matrix, tables)
        return tables

    def _parts(self, length: int) -> Iterator[tuple[int, int]]:
        for start in range(0, length, self._most_bytes):
            yield start, min(self._most_bytes, length - start)


def load() -> IsalKernel:
    """ISA-L from the pyeclib wheel, or else the system's. OSError tells what was tried."""
    failures = []
    for path in _candidates():
        try:
            kernel = IsalKernel(ctypes.CDLL(path))
        except (OSError, AttributeError) as error:  # no such library, no such function
            failures.append(str(error))
            continue
        if agrees_with_numpy(kernel):
            return kernel
        failures.append(f"{path}: computes wrongly on this processor")
    raise OSError("; ".join(failures))


def _candidates() -> Iterator[str]:
    # The wheel's first: that is the one tested with. Only its file is used: pyeclib's own functions copy.
    found = importlib.util.find_spec("pyeclib")
    if found is not None and found.origin is not None:
        beside = Path(found.origin).parents[1] / "pyeclib.libs"
        yield from sorted(str(path) for path in beside.glob("libisal*.so*"))
    yield "libisal.so.2"


def agrees_with_numpy(kernel: IsalKernel | NumpyKernel) -> bool:
    """Whether both operations give the right bytes at lengths where a vectorised loop can go wrong.

    Parity is only ever read when something else was lost; it is too late then to learn that it is wrong.
    """
    twin, generator = NumpyKernel(), np.random.default_rng(0)
    matrix = generator.integers(0, 256, (3, 5), np.uint8)
    for length in CHECKED_LENGTHS:
        sources = list(generator.integers(0, 256, (5, length), np.uint8))
        expected, found = np.zeros((2, 3, length), np.uint8)
        for used, targets in ((twin, expected), (kernel, found)):
            used.multiply(matrix, sources, list(targets))
            used.multiply_add(int(matrix[0, 1]), sources[4], targets[2])
        if not np.array_equal(expected, found):
            return False
    return True


def _address(array: Bytes) -> int:
    if array.flags.writeable:  # four times faster than what works for all
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    return int(array.ctypes.data)


def _pointers(arrays: Sequence[Bytes], offset: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(_address(array) + offset for array in arrays))
