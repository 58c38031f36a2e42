"""`Codec` against ISA-L's own functions, called with tables and pointers made beforehand, turn by turn.

`encode`, which has all blocks at once, beside `ec_encode_data`. `update`, which adds one block to one parity block, as
a keeper does, beside `ec_encode_data_update` for one parity block.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from snapshot.codec import Codec
from snapshot.galois import Bytes
from snapshot.isal import IsalKernel, load

RANGE_BYTES = 1 << 20
RANGES = 16
"""Of each block, one after another: more than the caches of a core hold."""
CODES = ((4, 2), (7, 1))
ROUNDS = 21


def measure() -> dict[str, dict[str, Any]]:
    """By code: the bytes of data of one pass, and the seconds of each pass, by what was called."""
    found = {}
    for k, m in CODES:
        data, parity = (np.random.default_rng(0).integers(0, 256, (n, RANGES, RANGE_BYTES), np.uint8) for n in (k, m))
        codec, kernel = Codec(k, m, "isal"), load()
        passes: dict[str, Callable[[], None]] = {
            "ec_encode_data": _raw(codec, kernel, data, parity),
            "ec_encode_data_update": _raw_update(codec, kernel, data, parity),
            "encode": lambda codec=codec, data=data, parity=parity: _encode(codec, data, parity),  # type: ignore[misc]
            "update": lambda codec=codec, data=data, parity=parity: _update(codec, data, parity),  # type: ignore[misc]
        }
        times: dict[str, list[float]] = {name: [] for name in passes}
        for number in range(ROUNDS + 1):
            for name, run in passes.items():
                began = time.perf_counter()
                run()
                if number:
                    times[name].append(time.perf_counter() - began)
        found[f"k={k}, m={m}"] = {"data_bytes": data.nbytes, "seconds": times}
    return found


def _encode(codec: Codec, data: Bytes, parity: Bytes) -> None:
    for number in range(RANGES):
        codec.encode(list(data[:, number]), list(parity[:, number]))


def _update(codec: Codec, data: Bytes, parity: Bytes) -> None:
    for number in range(RANGES):
        for column in range(codec.k):
            for row in range(codec.m):
                codec.update(row, column, data[column, number], parity[row, number])


def _pointers(blocks: Bytes) -> list[ctypes.Array[ctypes.c_void_p]]:
    """For each range, the addresses of it in all blocks."""
    return [(ctypes.c_void_p * len(blocks))(*(block[n].ctypes.data for block in blocks)) for n in range(RANGES)]


def _raw(codec: Codec, kernel: IsalKernel, data: Bytes, parity: Bytes) -> Callable[[], None]:
    tables = kernel._make_tables((codec.m, codec.k), codec.coefficients.tobytes())
    calls = list(zip(_pointers(data), _pointers(parity), strict=True))

    def run() -> None:
        for read, written in calls:
            kernel._multiply(RANGE_BYTES, codec.k, codec.m, tables, read, written)

    return run


def _raw_update(codec: Codec, kernel: IsalKernel, data: Bytes, parity: Bytes) -> Callable[[], None]:
    """As raw, but the data comes block by block, for one parity block: it is read and written for each of them."""
    tables = [kernel._make_tables((1, codec.k), row.tobytes()) for row in codec.coefficients]
    written = [_pointers(parity[row : row + 1]) for row in range(codec.m)]
    addresses = [[int(block[number].ctypes.data) for block in data] for number in range(RANGES)]

    def run() -> None:
        for number, of_blocks in enumerate(addresses):
            for column, address in enumerate(of_blocks):
                for row in range(codec.m):
                    kernel._multiply_add(RANGE_BYTES, codec.k, 1, column, tables[row], address, written[row][number])

    return run
