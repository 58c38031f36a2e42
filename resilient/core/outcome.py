"""What all ranks of a pipeline must know of a step, and only some of them have computed. Pure.

Each rank brings a row of integers into one exchange, with what it knows, and NOBODYS where it knows nothing; the
minimum over all ranks is what is known. Whoever knows the same has the same bits, so the minimum is exact. That this
exchange has come to an end says also that every rank has its own stage's sums: whoever sees it end may apply the step.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from .lane import NOBODYS

_NAN = struct.unpack("<q", struct.pack("<d", math.nan))[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """losses: of each micro-batch. norms: of each parameter's mean gradient, None where it has none. finite: whether
    all of both are."""

    losses: tuple[float | None, ...]
    norms: tuple[float | None, ...]
    finite: bool = True

    def row(self) -> list[int]:
        return [int(self.finite), *map(_bits, self.losses), *map(_bits, self.norms)]

    @classmethod
    def of(cls, row: Sequence[int], losses: int) -> Outcome:
        """row: the minimum of all ranks' rows. losses: how many there are."""
        return cls(
            finite=bool(row[0]),
            losses=tuple(map(_value, row[1 : 1 + losses])),
            norms=tuple(map(_value, row[1 + losses :])),
        )


def _bits(value: float | None) -> int:
    """Any NaN is the same one: NOBODYS would be one too."""
    if value is None:
        return NOBODYS
    return _NAN if math.isnan(value) else int(struct.unpack("<q", struct.pack("<d", value))[0])


def _value(bits: int) -> float | None:
    return None if bits == NOBODYS else float(struct.unpack("<d", struct.pack("<q", bits))[0])
