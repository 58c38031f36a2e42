"""Reed-Solomon codes over buffers: k data blocks, m parity blocks, and any k of them give back the rest.

The code is systematic: data blocks stay as they are. Parity block j is the sum of coefficients[j, i] times data
block i, in the field of `galois`. Row 0 of the coefficients is all ones, so that one parity block is the XOR of
the data; so is column 0, so that with one data block every parity block is a copy of it. (Plank, A Tutorial on
Reed-Solomon Coding for Fault-Tolerance in RAID-like Systems, 1997, with a Cauchy matrix.)

ISA-L computes it where it can be loaded; NumPy gives the same bytes slowly where not, after a warning.

Buffers may be anything contiguous that has the buffer protocol, and need no alignment. What is written must not
overlap with what is read. Nothing here keeps a reference to a buffer, and all of it may be called from several
threads at once; while ISA-L computes, the interpreter's lock is free.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from snapshot import isal
from snapshot.galois import Bytes, NumpyKernel, cauchy, inverse, matrix_product

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from numpy.typing import NDArray
    from typing_extensions import Buffer as Buffers

    # Arrays by name: their stubs say that they are buffers from Python 3.12 on only.
    Buffer: TypeAlias = Buffers | NDArray[Any]

MOST_BLOCKS = 255
BACKENDS = ("isal", "numpy")


class Kernel(Protocol):
    """Who does the arithmetic. `NumpyKernel` says what each promises."""

    name: str

    def multiply(self, matrix: Bytes, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None: ...

    def multiply_add(self, coefficient: int, source: Bytes, target: Bytes) -> None: ...


class Codec:
    """The code of k data blocks and m parity blocks. Blocks 0..k-1 are data, k..k+m-1 are parity.

    coefficients: (m, k) uint8; they depend on k and m only, and are the same with every backend and release.
    """

    def __init__(self, k: int, m: int, backend: str | None = None) -> None:
        if k < 1:
            raise ValueError(f"k: got {k}, must be at least 1")
        if m < 0:
            raise ValueError(f"m: got {m}, must be at least 0")
        if k + m > MOST_BLOCKS:
            raise ValueError(f"k + m: got {k} + {m} = {k + m}, must be at most {MOST_BLOCKS}")
        self.k, self.m = k, m
        self.coefficients = _coefficients(k, m)
        self._kernel = _kernel(backend)

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """Writes all m parity blocks of the k data blocks; all are of one length."""
        sources = _blocks("data", data, self.k)
        targets = _blocks("parity", parity, self.m, writable=True)
        _check_lengths({"data": sources, "parity": targets})
        self._kernel.multiply(self.coefficients, sources, targets)

    def update(self, row: int, column: int, source: Buffer, parity: Buffer) -> None:
        """Adds data block `column` to parity block `row`, which begins as zeros; or any equal range of both.

        In whatever order and ranges the data comes, the sum of all of it is what `encode` writes. Adding the
        same data twice takes it out again.
        """
        if not 0 <= row < self.m:
            raise ValueError(f"row: got {row}, must be within 0..{self.m - 1} (m = {self.m})")
        if not 0 <= column < self.k:
            raise ValueError(f"column: got {column}, must be within 0..{self.k - 1} (k = {self.k})")
        _multiply_add(self._kernel, int(self.coefficients[row, column]), source, parity, "parity")

    def recovery_coefficients(self, available: Iterable[int], wanted: Sequence[int]) -> dict[int, dict[int, int]]:
        """For each wanted block the coefficients by available block: block = sum of coefficient * block.

        Of more than k available blocks those of lowest index are used: data before parity. Blocks that
        contribute nothing are left out.
        """
        used, matrix = self._recovery(available, wanted)
        rows = [{index: int(value) for index, value in zip(used, row, strict=True) if value} for row in matrix]
        return dict(zip(wanted, rows, strict=True))

    def reconstruct(self, available: Mapping[int, Buffer], wanted: Sequence[int], out: Sequence[Buffer]) -> None:
        """Writes the wanted blocks, data or parity, into `out`, from any k available ones."""
        used, matrix = self._recovery(available, wanted)
        sources = _blocks("available", [available[index] for index in used], self.k)
        targets = _blocks("out", out, len(wanted), writable=True)
        _check_lengths({"available": sources, "out": targets})
        self._kernel.multiply(matrix, sources, targets)

    def _recovery(self, available: Iterable[int], wanted: Sequence[int]) -> tuple[tuple[int, ...], Bytes]:
        """The k blocks to use, and the matrix (wanted, k) that makes the wanted ones from them."""
        given = sorted(set(available))
        for name, indices in (("available", given), ("wanted", wanted)):
            for index in indices:
                if not 0 <= index < self.k + self.m:
                    raise ValueError(f"{name}: got block {index}, must be within 0..{self.k + self.m - 1}")
        if len(given) < self.k:
            raise ValueError(f"available: got {len(given)} blocks {given}, must be at least k = {self.k}")
        used = tuple(given[: self.k])
        return used, _recovery_matrix(self.k, self.m, used, tuple(wanted))


def multiply_add(coefficient: int, source: Buffer, target: Buffer, backend: str | None = None) -> None:
    """target += coefficient * source: one step of decoding, as bytes arrive (see `recovery_coefficients`)."""
    if not 0 <= coefficient <= 255:
        raise ValueError(f"coefficient: got {coefficient}, must be within 0..255")
    _multiply_add(_kernel(backend), coefficient, source, target, "target")


def backend() -> str:
    """What computes parity in this process: "isal", or "numpy" where ISA-L cannot be loaded."""
    return _fastest().name


@cache
def _coefficients(k: int, m: int) -> Bytes:
    found = cauchy(m, k)
    found.flags.writeable = False
    return found


# Decoding comes in many ranges of the same few blocks.
@lru_cache(maxsize=1024)
def _recovery_matrix(k: int, m: int, used: tuple[int, ...], wanted: tuple[int, ...]) -> Bytes:
    generator = np.vstack([np.eye(k, dtype=np.uint8), _coefficients(k, m)])
    return matrix_product(generator[list(wanted)], inverse(generator[list(used)]))


def _multiply_add(kernel: Kernel, coefficient: int, source: Buffer, target: Buffer, name: str) -> None:
    read, written = _block("source", source), _block(name, target, writable=True)
    _check_lengths({"source": [read], name: [written]})
    kernel.multiply_add(coefficient, read, written)


def _kernel(name: str | None) -> Kernel:
    if name is None:
        return _fastest()
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, must be one of {BACKENDS} or None for the fastest")
    return _isal() if name == "isal" else NumpyKernel()


@cache
def _isal() -> Kernel:
    return isal.load()


@cache
def _fastest() -> Kernel:
    try:
        return _isal()
    except OSError as error:
        warnings.warn(
            f"ISA-L could not be loaded, so NumPy computes parity, some hundred times slower ({error}). "
            "Install it: pip install pyeclib, or your system's package of libisal.so.2",
            RuntimeWarning,
            stacklevel=4,
        )
        return NumpyKernel()


def _block(name: str, buffer: Buffer, *, writable: bool = False) -> Bytes:
    try:
        block = np.frombuffer(cast("NDArray[Any]", buffer), np.uint8)
    except (BufferError, ValueError) as error:
        raise ValueError(f"{name}: {error}; must be a contiguous buffer") from error
    if writable and not block.flags.writeable:
        raise ValueError(f"{name}: got a read-only {type(buffer).__qualname__}, must be writable")
    return block


def _blocks(name: str, buffers: Sequence[Buffer], count: int, *, writable: bool = False) -> list[Bytes]:
    if len(buffers) != count:
        raise ValueError(f"{name}: got {len(buffers)} blocks, must be {count}")
    return [_block(f"{name}[{index}]", buffer, writable=writable) for index, buffer in enumerate(buffers)]


def _check_lengths(blocks: Mapping[str, Sequence[Bytes]]) -> None:
    lengths = {name: sorted({len(block) for block in found}) for name, found in blocks.items()}
    if len({length for found in lengths.values() for length in found}) > 1:
        shown = ", ".join(f"{name}: {' and '.join(map(str, found))} bytes" for name, found in lengths.items() if found)
        raise ValueError(f"{shown}; must all be of one length")
