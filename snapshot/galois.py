"""The field of 256 numbers that parity is computed in, and the obvious way to compute in it.

Addition is XOR; multiplication is that of polynomials modulo x^8 + x^4 + x^3 + x^2 + 1 (0x11d), in which 2
generates every number but 0. ISA-L has the same field. (Plank, A Tutorial on Reed-Solomon Coding, 1997.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]

POLYNOMIAL = 0x11D


def _tables() -> tuple[Bytes, Bytes]:
    """All products, by both factors, and all inverses; the inverse of 0 stands as 0."""
    powers, logs, power = np.zeros(255, np.uint8), np.zeros(256, np.int64), 1
    for exponent in range(255):
        powers[exponent], logs[power] = power, exponent
        power = power << 1 ^ (POLYNOMIAL if power & 0x80 else 0)
    products = powers[(logs[:, None] + logs[None, :]) % 255]
    products[0, :] = products[:, 0] = 0
    inverses = powers[-logs % 255]
    inverses[0] = 0
    return products, inverses


PRODUCTS, INVERSES = _tables()


def matrix_product(left: Bytes, right: Bytes) -> Bytes:
    """left (rows, inner) times right (inner, columns)."""
    rows = [np.bitwise_xor.reduce(PRODUCTS[row[:, None], right], axis=0) for row in left]
    return np.array(rows, np.uint8).reshape(len(left), right.shape[1])


def inverse(matrix: Bytes) -> Bytes:
    """Of a square matrix, which must have one (Gauss-Jordan elimination)."""
    size = len(matrix)
    work: Bytes = np.hstack([matrix, np.eye(size, dtype=np.uint8)])
    for column in range(size):
        pivot = column + int(np.argmax(work[column:, column] != 0))
        assert work[pivot, column], f"a singular matrix:\n{matrix}"
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = PRODUCTS[INVERSES[work[column, column]], work[column]]
        factors = work[:, column].copy()
        factors[column] = 0
        work ^= PRODUCTS[factors[:, None], work[column][None, :]]
    return work[:, size:]


def cauchy(rows: int, columns: int) -> Bytes:
    """A matrix of which every square part has an inverse, with ones in its first row and first column.

    1 / (x + y) with all x and y distinct is one (Cauchy), and scaling a row or a column keeps it so. The
    Vandermonde matrix that is often used is not one for all sizes. rows + columns <= 256.
    """
    x, y = np.arange(columns, columns + rows)[:, None], np.arange(columns)[None, :]
    matrix: Bytes = INVERSES[x ^ y]
    matrix = PRODUCTS[matrix, INVERSES[matrix[:1]]]
    matrix = PRODUCTS[matrix, INVERSES[matrix[:, :1]]]
    return matrix


class NumpyKernel:
    """Table lookups: some hundred times slower than ISA-L, and plain enough to judge it by."""

    name = "numpy"

    def multiply(self, matrix: Bytes, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        """targets = matrix (targets, sources) times sources; all blocks are of one length."""
        for row, target in zip(matrix, targets, strict=True):
            target[:] = 0
            for coefficient, source in zip(row, sources, strict=True):
                self.multiply_add(int(coefficient), source, target)

    def multiply_add(self, coefficient: int, source: Bytes, target: Bytes) -> None:
        """target += coefficient * source; both are of one length."""
        target ^= PRODUCTS[coefficient][source]
