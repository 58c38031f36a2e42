"""What a run is made of, as given by the user: checked once, and sent to controller and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .core.recovery import Limits

DRIVER_LEASE_DETECTIONS = 5
LEASE_DETECTIONS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The decorator's arguments. Raises ValueError or TypeError naming field, value and what is allowed."""

    name: str
    workers: tuple[int, int]
    spares: int
    resources: Mapping[str, float]
    seed: int
    reduction: Literal["exact", "fast"]
    detection_s: float
    wait_for_nodes_s: float
    allow_different_bits: bool

    def __post_init__(self) -> None:
        low, high = self.workers
        if low < 1 or high < low:
            raise ValueError(
                f"workers={self.workers}: needs 1 <= min <= max, as workers=4 or workers=(2, 4); "
                "the run waits for nodes below min and never uses more than max"
            )
        if self.spares < 0:
            raise ValueError(f"spares={self.spares}: needs 0 or more warm processes")
        if self.reduction not in ("exact", "fast"):
            raise ValueError(
                f'reduction={self.reduction!r}: is "exact" (same bits always) or "fast" (plain all-reduce)'
            )
        for field in ("detection_s", "wait_for_nodes_s"):
            value = getattr(self, field)
            if not (_is_number(value) and value > 0):
                raise ValueError(f"{field}={value!r}: needs a positive number of seconds")
        for resource, amount in self.resources.items():
            if not (_is_number(amount) and amount >= 0):
                raise ValueError(f"resources[{resource!r}]={amount!r}: needs a number of 0 or more")
        if not any(map(str.isalnum, self.name)) or not all(sign.isalnum() or sign in "-_." for sign in self.name):
            raise ValueError(f"name={self.name!r}: needs letters, digits, '-', '_' or '.', without spaces or slashes")

    @property
    def threads(self) -> int:
        """Threads of a rank's torch operations: part of the run, since bits depend on it."""
        return max(1, int(self.resources.get("CPU", 1)))

    @property
    def limits(self) -> Limits:
        return Limits(
            min_workers=self.workers[0],
            max_workers=self.workers[1],
            spares=self.spares,
            wait_for_nodes_s=self.wait_for_nodes_s,
            detection_s=self.detection_s,
        )

    @property
    def lease_s(self) -> float:
        """How long ranks and keepers live without a controller."""
        return LEASE_DETECTIONS * self.detection_s

    @property
    def driver_lease_s(self) -> float:
        """How long the controller lives without its driver."""
        return DRIVER_LEASE_DETECTIONS * self.detection_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One attempt of a run."""

    settings: Settings
    attempt: int
    function: bytes
    """The training function and its arguments, by cloudpickle."""
    secret: str

    @property
    def key(self) -> str:
        return f"{self.settings.name}/{self.attempt}"


def settings_from(
    *,
    name: Any,
    workers: Any,
    spares: Any,
    resources: Any,
    seed: Any,
    reduction: Any,
    detection_s: Any,
    wait_for_nodes_s: Any,
    allow_different_bits: Any,
) -> Settings:
    """Bring what users write into one form: workers=4 means (4, 4); spares and seed are whole numbers."""
    pair = (workers, workers) if _is_whole(workers) else workers
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(map(_is_whole, pair))):
        raise TypeError(f"workers={workers!r}: is a whole number, or two of them as (min, max)")
    for field, value in (("spares", spares), ("seed", seed)):
        if not _is_whole(value):
            raise TypeError(f"{field}={value!r}: is a whole number")
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: is a string")
    if not (resources is None or isinstance(resources, Mapping)):
        raise TypeError(f'resources={resources!r}: is a dict, such as {{"CPU": 2, "GPU": 1}}')
    if not isinstance(allow_different_bits, bool):
        raise TypeError(f"allow_different_bits={allow_different_bits!r}: is True or False")
    return Settings(
        name=name,
        workers=(pair[0], pair[1]),
        spares=spares,
        resources=dict(resources) if resources is not None else {"CPU": 1},
        seed=seed,
        reduction=reduction,
        detection_s=detection_s,
        wait_for_nodes_s=wait_for_nodes_s,
        allow_different_bits=allow_different_bits,
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
