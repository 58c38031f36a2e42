"""Training functions for the tests, with faults that ranks bring upon themselves at exact points.

A fault happens once in a run, whoever gets there: a marker file that can only be created once says so.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import resilient


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to rank `rank` in step `step`, at `phase` of it."""

    marker: str
    rank: int
    step: int
    phase: str
    sign: int = signal.SIGKILL

    def strike(self, run: resilient.Run, phase: str) -> None:
        if (run.rank, run.step, phase) == (self.rank, self.step, self.phase):
            self.now()

    def now(self) -> None:
        if claim(self.marker):
            os.kill(os.getpid(), self.sign)


def claim(marker: str) -> bool:
    """True for the first who asks."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Two hundred samples with augmentation: every read draws anew from three generators."""

    def __init__(self, audit: str | None = None) -> None:
        self.audit = audit

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        fixed = torch.Generator().manual_seed(index)
        noise = torch.randn(12) * random.choice([0.1, 0.2])
        return torch.randn(12, generator=fixed) + noise, torch.tensor(index % 3)


class Net(nn.Module):
    """Dropout, BatchNorm, a parameter that is sometimes unused, and one that always is."""

    def __init__(self, on_forward: Callable[[], None], on_backward: Callable[[], None]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
        self.rare = nn.Parameter(torch.full((3,), 0.01))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("constant", torch.ones(5))
        self._on_forward, self._on_backward = on_forward, on_backward

    def forward(self, x: Tensor) -> Tensor:
        self._on_forward()
        out: Tensor = self.body(x)
        if float(x.detach().sum()) > 0:
            out = out + self.rare
        if out.requires_grad:
            out.register_hook(self._hook)
        return out

    def _hook(self, gradient: Tensor) -> None:
        self._on_backward()


def strike_while_reducing(run: resilient.Run, fault: Fault) -> None:
    """Strike in the middle of this rank's exchange of the fault's step, after its first fold."""
    from resilient import exchange

    fold = exchange._fold

    def striking(*args: Any) -> None:
        fold(*args)
        fault.strike(run, "reduce")

    exchange._fold = striking


def body(
    run: resilient.Run,
    *,
    steps: int,
    faults: tuple[Fault, ...] = (),
    global_batch: int = 32,
    micro_batch: int = 4,
    workers: int = 0,
    before: Callable[[resilient.Run], None] | None = None,
    dataset: Any = None,
    pace_s: float = 0.0,
) -> dict[str, Any]:
    """A loop with everything in it; returns what the audit needs."""

    def at(phase: str) -> None:
        for fault in faults:
            fault.strike(run, phase)

    for fault in faults:
        if fault.phase == "reduce":
            strike_while_reducing(run, fault)
    if before is not None:
        before(run)
    model = Net(lambda: at("forward"), lambda: at("backward"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
    loss_of = nn.CrossEntropyLoss()
    pace = threading.Event()
    for x, y in run.batches(
        dataset or Noisy(), global_batch=global_batch, micro_batch=micro_batch, steps=steps, num_workers=workers
    ):
        loss = loss_of(model(x), y)
        loss.backward()
        if run.committing:
            at("reduced")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if run.committing:
            at("stepped")
        scheduler.step()
        optimizer.zero_grad()
        run.log(accuracy=0.5)
        pace.wait(pace_s)
    return {"step": run.step, "rank": run.rank, "generation": run.generation}


def train(name: str, **settings: Any) -> Any:
    """A training function of this name: settings for the decorator, the call's arguments for the body."""

    def main(run: resilient.Run, **kwargs: Any) -> dict[str, Any]:
        return body(run, **kwargs)

    settings = {"resources": {"CPU": 1}, "seed": 3, **settings}
    return resilient.train(name=name, **settings)(main)


def fault(folder: Path, rank: int, step: int, phase: str, sign: int = signal.SIGKILL) -> Fault:
    marker = folder / f"fault-{rank}-{step}-{phase}"
    return Fault(marker=str(marker), rank=rank, step=step, phase=phase, sign=sign)
