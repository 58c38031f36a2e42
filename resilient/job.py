"""What a run is made of, as given by the user: checked once, and sent to controller and ranks."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .core.limits import Limits
from .core.listening import AUTO, address_of

DRIVER_LEASE_DETECTIONS = 5
LEASE_DETECTIONS = 15
MOST_PARITY = 16
HIGHEST_ZSTD = 22
LONGEST_NAME = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Snapshots of the state in the nodes' memory. Raises ValueError naming field, value and what is allowed.

    every: a snapshot at the start of every so many steps, or "auto": as often as `budget` allows.
    budget: the share of the step time that "auto" may spend.
    parity: how many nodes of a group may be lost together without loss; at most one less than there are.
    linger_s: how long snapshots are kept after the run has ended without finishing, for it to be submitted
        again under the same name.
    directory: memory-backed; has to have room for three times a node's share of the state, and parity.
    verify: whether ranks compare digests of the whole state at each snapshot, so that bits which a machine has changed
        by itself are found, the rank replaced, and what it computed since undone.
    """

    every: int | Literal["auto"] = "auto"
    budget: float = 0.02
    parity: int = 1
    linger_s: float = 600.0
    directory: str = "/dev/shm"
    verify: bool = True

    def __post_init__(self) -> None:
        if self.every != "auto" and not (_is_whole(self.every) and self.every >= 1):
            raise ValueError(f'Snapshot(every={self.every!r}): is "auto" or a whole number of steps from 1 on')
        if not (_is_number(self.budget) and 0 < self.budget <= 1):
            raise ValueError(f"Snapshot(budget={self.budget!r}): is a share of the step time, above 0 and up to 1")
        if not (_is_whole(self.parity) and 0 <= self.parity <= MOST_PARITY):
            raise ValueError(f"Snapshot(parity={self.parity!r}): is a whole number of nodes, 0..{MOST_PARITY}")
        if not (_is_number(self.linger_s) and self.linger_s >= 0):
            raise ValueError(f"Snapshot(linger_s={self.linger_s!r}): is a number of seconds, 0 or more")
        if isinstance(self.directory, str):
            object.__setattr__(self, "directory", at_home(self.directory))
        if not (isinstance(self.directory, str) and self.directory.startswith("/")):
            raise ValueError(f"Snapshot(directory={self.directory!r}): is an absolute path, such as /dev/shm")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Snapshots on storage, written in the background. Raises ValueError naming field, value and what is allowed.

    url: a folder that all nodes can write to, or a place in an object store: a path (~ is the home of the user who
        submits the run), s3://bucket/name, gs://...
    every: a checkpoint at the start of every so many steps, or after so much time, such as "10min" or "90s"; and of
        the final state.
    keep: how many complete ones to keep.
    compression: zstd level, 1..22, or "none".
    resume: "auto" goes on from the newest snapshot or checkpoint that there is, "never" begins at step 0, a step
        begins with the checkpoint of exactly that step.
    resume_from: where another run keeps its checkpoints, to begin from the newest of them as long as `url` has none of
        this run. It is read, never written to.
    """

    url: str
    every: int | str = "10min"
    keep: int = 3
    compression: int | Literal["none"] = 1
    resume: Literal["auto", "never"] | int = "auto"
    resume_from: str | None = None

    def __post_init__(self) -> None:
        for field in ("url", "resume_from"):
            place = getattr(self, field)
            if place is None and field == "resume_from":
                continue
            if not (isinstance(place, str) and place):
                raise ValueError(f"Checkpoint({field}={place!r}): is a path or a URL, such as s3://bucket/name")
            if "://" not in place:  # other processes work in other folders
                object.__setattr__(self, field, os.path.abspath(at_home(place)))
        if self.resume_from == self.url:
            raise ValueError(
                f"Checkpoint(resume_from={self.resume_from!r}): is the url itself, and that is only read: give the run "
                "a url of its own"
            )
        if self.resume_from is not None and self.resume == "never":
            raise ValueError('Checkpoint(resume="never", resume_from=...): leave out one of them')
        whole = _is_whole(self.every) and isinstance(self.every, int) and self.every >= 1
        if not whole and self.every_s is None:
            raise ValueError(
                f'Checkpoint(every={self.every!r}): is a whole number of steps from 1 on, or a time such as "10min", '
                '"90s" or "2h"'
            )
        if not (_is_whole(self.keep) and self.keep >= 1):
            raise ValueError(f"Checkpoint(keep={self.keep!r}): is a whole number of checkpoints from 1 on")
        if self.compression != "none" and not (_is_whole(self.compression) and 1 <= self.compression <= HIGHEST_ZSTD):
            raise ValueError(
                f'Checkpoint(compression={self.compression!r}): is a zstd level 1..{HIGHEST_ZSTD}, or "none"'
            )
        if self.resume not in ("auto", "never") and not (_is_whole(self.resume) and int(self.resume) >= 0):
            raise ValueError(f'Checkpoint(resume={self.resume!r}): is "auto", "never", or a step')

    @property
    def every_steps(self) -> int | None:
        return self.every if isinstance(self.every, int) else None

    @property
    def every_s(self) -> float | None:
        return in_seconds(self.every) if isinstance(self.every, str) else None

    @property
    def level(self) -> int | None:
        """Of zstd; None for none."""
        return None if self.compression == "none" else self.compression


def at_home(path: str) -> str:
    """~ and ~user are this user's and that user's home, which other processes may not know. Raises ValueError."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        home = found.partition("/")[0]
        raise ValueError(
            f"{path!r}: {home} is nobody's home folder here; give an absolute path, or ./{home} for a folder"
        )
    return found


_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"(?P<number>\d+(\.\d+)?) *(?P<unit>s|min|h)")


def in_seconds(time: str) -> float | None:
    """Of "90s", "10min" or "2h"; None for anything else, and for no time at all."""
    found = _TIME.fullmatch(time)
    return float(found["number"]) * _UNITS_S[found["unit"]] or None if found else None


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
    snapshot: Snapshot | None = None
    checkpoint: Checkpoint | None = None
    on_nonfinite: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    max_failures: int | None = None
    evict_stragglers: bool = False
    observe: str | None = AUTO
    ray_metrics: bool = False

    def __post_init__(self) -> None:
        low, high = self.workers
        if low < 1 or high < low:
            raise ValueError(
                f"workers={self.workers}: needs 1 <= min <= max, as workers=4 or workers=(2, 4); "
                "the run waits for nodes below min and never uses more than max"
            )
        if self.spares < 0:
            raise ValueError(f"spares={self.spares}: needs 0 or more warm processes")
        if self.max_failures is not None and not (_is_whole(self.max_failures) and self.max_failures >= 0):
            raise ValueError(f"max_failures={self.max_failures!r}: is a whole number per hour, or None for no limit")
        if self.reduction not in ("exact", "fast"):
            raise ValueError(
                f'reduction={self.reduction!r}: is "exact" (same bits always) or "fast" (plain all-reduce)'
            )
        if self.on_nonfinite not in ("ignore", "stop", "skip", "rollback"):
            raise ValueError(f'on_nonfinite={self.on_nonfinite!r}: is "ignore", "stop", "skip" or "rollback"')
        if self.on_nonfinite == "rollback" and self.snapshot is None:
            raise ValueError('on_nonfinite="rollback" needs snapshots to go back to: pass snapshot=Snapshot(...) too')
        for field in ("detection_s", "wait_for_nodes_s"):
            value = getattr(self, field)
            if not (_is_number(value) and value > 0):
                raise ValueError(f"{field}={value!r}: needs a positive number of seconds")
        if self.observe is not None:
            address_of(self.observe, "")
        for resource, amount in self.resources.items():
            if not (_is_number(amount) and amount >= 0):
                raise ValueError(f"resources[{resource!r}]={amount!r}: needs a number of 0 or more")
        if (gpus := self.resources.get("GPU", 0)) > 1:
            raise ValueError(
                f"resources['GPU']={gpus!r}: a rank trains on one GPU, or on a part of one that it shares with others; "
                "give 1, or a fraction such as 0.5, and more workers"
            )
        _check_name(self.name)

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
            snapshots=self.snapshot is not None,
            checkpoints=self.checkpoint is not None,
            wait_for_nodes_s=self.wait_for_nodes_s,
            detection_s=self.detection_s,
            max_failures=self.max_failures,
            evict_stragglers=self.evict_stragglers,
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
class StoredFunction:
    """The training function with its arguments, as it is in the cluster's keys: see `function_store`."""

    pieces: int = 0
    digest: str = ""
    """xxh3-128 of all pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One attempt of a run."""

    settings: Settings
    attempt: int
    function: StoredFunction
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
    snapshot: Any = None,
    checkpoint: Any = None,
    on_nonfinite: Any = "ignore",
    max_failures: Any = None,
    evict_stragglers: Any = False,
    observe: Any = AUTO,
    ray_metrics: Any = False,
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
    for field, value in (
        ("allow_different_bits", allow_different_bits),
        ("evict_stragglers", evict_stragglers),
        ("ray_metrics", ray_metrics),
    ):
        if not isinstance(value, bool):
            raise TypeError(f"{field}={value!r}: is True or False")
    if not (snapshot is None or isinstance(snapshot, Snapshot)):
        raise TypeError(f"snapshot={snapshot!r}: is a resilient.Snapshot(...), or None for none")
    if not (checkpoint is None or isinstance(checkpoint, Checkpoint)):
        raise TypeError(f"checkpoint={checkpoint!r}: is a resilient.Checkpoint(...), or None for none")
    if not (observe is None or isinstance(observe, str)):
        raise TypeError(f'observe={observe!r}: is "auto", "HOST:PORT" or ":PORT", or None to serve nothing')
    if checkpoint is not None and snapshot is None:
        snapshot = Snapshot()  # checkpoints are written from them
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
        snapshot=snapshot,
        checkpoint=checkpoint,
        on_nonfinite=on_nonfinite,
        max_failures=max_failures,
        evict_stragglers=evict_stragglers,
        observe=observe,
        ray_metrics=ray_metrics,
    )


def _check_name(name: str) -> None:
    if not any(map(str.isalnum, name)) or not all(sign.isalnum() or sign in "-_." for sign in name):
        raise ValueError(f"name={name!r}: needs letters, digits, '-', '_' or '.', without spaces or slashes")
    if (size := len(name.encode())) > LONGEST_NAME:
        raise ValueError(
            f"name={name[:20] + '...'!r}: has {size} bytes; names become folders, and have {LONGEST_NAME} at most"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
