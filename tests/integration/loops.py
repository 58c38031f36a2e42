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
from snapshot.core.branches import data_position


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

    def flip(self, run: resilient.Run, parameter: Tensor, phase: str) -> None:
        """A bit of a parameter changes, as in a broken memory: torch knows nothing of it."""
        if self.phase == phase and (run.rank, run.step) == (self.rank, self.step) and claim(self.marker):
            parameter.detach().numpy().view("uint8").flat[3] ^= 1


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


def arm(run: resilient.Run, fault: Fault) -> None:
    """Prepare a fault that strikes inside the runtime, in the process of this rank."""
    if fault.phase == "reduce":
        _arm_reduce(run, fault)
    elif fault.phase == "sent to rank 0 only":
        _arm_partial(run, fault)
    elif fault.phase in ("unplanned", "serving", "receiving", "welcoming", "joined"):
        _arm_leveling(run, fault)


def _arm_reduce(run: resilient.Run, fault: Fault) -> None:
    """In the middle of this rank's exchange of the step, after its first fold."""
    from resilient import exchange

    fold = exchange._fold

    def striking(*args: Any) -> None:
        fold(*args)
        fault.strike(run, "reduce")

    exchange._fold = striking


def _arm_partial(run: resilient.Run, fault: Fault) -> None:
    """After the exchange's result slice of this rank has gone to rank 0, and to nobody else."""
    from actors.group import Group
    from resilient import exchange

    post = Group.post

    def posting(self: Group, sends: Any, receives: Any) -> Any:
        sends, receives = list(sends), list(receives)
        back = any(move.tag == exchange.GATHER_TAG for move in sends)
        if not back or (run.rank, run.step) != (fault.rank, fault.step) or not claim(fault.marker):
            return post(self, sends, receives)
        post(self, [move for move in sends if move.peer == 0], receives).wait()
        threading.Event().wait(0.3)
        os.kill(os.getpid(), fault.sign)

    Group.post = posting


def _arm_leveling(run: resilient.Run, fault: Fault) -> None:
    """While a generation is levelled: an unplanned one as such ("unplanned"), at a holder that serves a
    laggard ("serving") or a joiner ("welcoming"), at a joiner that receives ("receiving") or has just
    been seated ("joined"). The fault's step is that which the rank is in; for joiners any."""
    from resilient.generation import GenerationThread

    afterwards = fault.phase in ("joined", "receiving")

    def wrap(method: str, when: Callable[[GenerationThread], bool]) -> None:
        original = getattr(GenerationThread, method)

        def wrapped(self: GenerationThread, *args: Any) -> Any:
            strikes = when(self) and fault.step <= run.step + 1 and fault.rank in (self.rank, -1)
            if strikes and not afterwards:
                fault.now()
            result = original(self, *args)
            if strikes and afterwards:
                fault.now()
            return result

        setattr(GenerationThread, method, wrapped)

    if fault.phase == "unplanned":
        wrap("_level", lambda self: self.plan.kind == "unplanned")
    elif fault.phase == "serving":
        wrap("_catch_up", lambda self: self._holding.complete == fault.step)
    elif fault.phase == "welcoming":
        wrap("_send_state", lambda self: self.plan.kind == "planned")
    elif fault.phase == "receiving":
        wrap("_receive_state", lambda self: self.plan.kind == "planned")
    else:
        wrap("_level", lambda self: self.plan.kind == "planned" and not self._holding.has_state)


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
    hold: str = "",
    poisoned: int = -1,
    in_step: Callable[[resilient.Run], None] = lambda run: None,
) -> dict[str, Any]:
    """A loop with everything in it. It goes slowly until the file `hold`, if it names one, exists.

    poisoned: a position in the data, in steps, where the loss is not finite.
    """

    def at(phase: str) -> None:
        for fault in faults:
            fault.strike(run, phase)

    for fault in faults:
        arm(run, fault)
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
        in_step(run)
        for fault in faults:
            fault.flip(run, model.body[0].weight, "flip")
        loss = loss_of(model(x), y)
        if data_position(run.step, run._team.skipped) == poisoned:
            loss = loss * float("nan")
        loss.backward()
        if run.committing:
            at("reduced")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if run.committing:
            at("stepped")
            for fault in faults:
                fault.flip(run, model.body[0].weight, "flip once updated")
        scheduler.step()
        optimizer.zero_grad()
        run.log(accuracy=0.5)
        if hold and run.committing and not os.path.exists(hold):
            pace.wait(0.3)
    return {"step": run.step, "rank": run.rank, "generation": run.generation}


def train(name: str, carried_bytes: int = 2 << 20, **settings: Any) -> Any:
    """A training function of this name: settings for the decorator, the call's arguments for the body.

    carried_bytes: of data, in whole MiB, that the function brings along, as scripts do that make their dataset at the
        top. More than Ray sends inline.
    """
    carried = random.Random(0).randbytes(1 << 20) * (carried_bytes >> 20)

    def main(run: resilient.Run, **kwargs: Any) -> dict[str, Any]:
        assert len(carried) == carried_bytes
        return body(run, **kwargs)

    settings = {"resources": {"CPU": 1}, "seed": 3, **settings}
    return resilient.train(name=name, **settings)(main)


def fault(folder: Path, rank: int, step: int, phase: str, sign: int = signal.SIGKILL) -> Fault:
    marker = folder / f"fault-{rank}-{step}-{phase}"
    return Fault(marker=str(marker), rank=rank, step=step, phase=phase, sign=sign)
