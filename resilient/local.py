"""A run in one process, without Ray: the reference for every 'identical'."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from ray import cloudpickle

from .job import Settings
from .local_saving import LocalSaving
from .randomness import kept_generators
from .result import Result
from .spilled import Spilled
from .team import Alone
from .worker import call, device_for


def run_locally(settings: Settings, pack: Callable[[], bytes]) -> Result:
    rows = Spilled[dict[str, float]]()
    team = Alone(
        on_step=lambda step, values: rows.append({"step": float(step), **values}),
        workers=settings.workers,
        saving=LocalSaving(settings.checkpoint, settings.name) if settings.checkpoint is not None else None,
    )
    device = device_for(settings.resources)
    with _as_in_a_rank(settings.threads, device), contextlib.closing(team):
        value, digest = call(lambda: cloudpickle.loads(pack()), team, settings, device)
    return Result(step=team.step, metrics=rows, digest=digest, returned=value)


@contextlib.contextmanager
def _as_in_a_rank(threads: int, device: torch.device) -> Iterator[None]:
    """The thread count of the run's ranks; the caller's generators and thread count come back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kept_generators(device):
            yield
    finally:
        torch.set_num_threads(before)
